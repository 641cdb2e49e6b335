"""Pictures drawn by other code are what outsider.py says they are."""
import random
from collections import Counter

import pytest

import experiments.outsider
import toy.world


@pytest.mark.parametrize("scattered", [False, True])
def test_pictures_are_of_the_style_that_is_promised(scattered, monkeypatch):
    places, draw = [], experiments.outsider.shape
    monkeypatch.setattr(experiments.outsider, "shape", lambda pen, kind, x, y, r, colour: (places.append((x, y, r)), draw(pen, kind, x, y, r, colour)))
    across = 0
    for seed in range(40):
        places.clear()
        image, things = experiments.outsider.picture(random.Random(seed), scattered)
        (wide, high), n = image.size, len(things)
        assert 200 <= wide <= 800 and 200 <= high <= 800 and wide != high and 2 <= n == len(places) <= 5
        assert {*things} <= {*toy.world.PAIRS} - toy.world.HELD_OUT
        ends = [[(int(3 * (x + s * r * 0.999) / wide), int(3 * (y + s * r * 0.999) / high)) for s in (-1, 1)] for x, y, r in places]
        across += sum(a != b for a, b in ends)
        if not scattered:
            assert len({a for a, _ in ends}) == n  # a ninth each
    assert (across > 40) == scattered and (across == 0) == (not scattered)


def test_questions_have_one_answer_each():
    asked = experiments.outsider.questions([("red", "star"), ("red", "ring"), ("blue", "ring")], "x")
    assert [(q.text, q.answer) for q in asked] == [
        ("What colour is the star?", "red"), ("What shape is the blue thing?", "ring"), ("How many things are there?", "3"),
        ("How many blue things are there?", "1"), ("How many red things are there?", "2")]
    assert Counter(q.family for q in asked) == {"colour": 1, "shape": 1, "count": 3}
