"""What scorers return, its confidence interval, and how a run's scores are shown and kept.

Next: vqa.py, the first of the scorers.
"""
from dataclasses import dataclass, field

import numpy as np

from cli import UserError

RESAMPLES = 1000


@dataclass
class Score:
    """A benchmark's score, in such a form that it can be computed again for a resample.

    groups  list of float[n, k]: a row for each question, or for each pair of questions, that is
            drawn as one. Groups are drawn from separately
    value   function (list of float[k], the groups' means) -> the score
    details {name: number}; notes: what was left out or counted wrong, in words
    """
    groups: list
    value: object
    details: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)

    def headline(self):
        return float(self.value([group.mean(0) for group in self.groups]))

    def interval(self, seed=0):
        """[low, high]: 95 % of the scores of 1,000 bootstrap resamples lie between them."""
        rng = np.random.default_rng(seed)
        drawn = [self.value([g[rng.integers(len(g), size=len(g))].mean(0) for g in self.groups])
                 for _ in range(RESAMPLES)]
        return [float(x) for x in np.percentile(drawn, (2.5, 97.5))]


def percent(means):
    return 100 * means[0][0]


def mean_score(values, kinds=None, notes=()):
    """The Score of a mean over questions, in per cent; kinds: {name: values} for the details."""
    if len(values) == 0:
        raise UserError("no question has an answer")
    details = {kind: 100 * float(np.mean(some)) for kind, some in sorted((kinds or {}).items())}
    return Score([np.array(values, float)[:, None]], percent, details, list(notes))


def unanswered(questions, texts, fate=None):
    """[note] about questions without an answer, [] if there are none.

    fate  what the official tool does with them; None: it fails, and this raises UserError
    """
    lacking = [q for q, text in zip(questions, texts) if text is None]
    if not lacking:
        return []
    text = (f"{len(lacking)} of {len(questions)} questions have no answer, "
            f"the first is {lacking[0].id}")
    if fate is None:
        raise UserError(text)
    return [f"{text}: {fate}"]
