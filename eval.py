"""Score a checkpoint: `python eval.py --model out/toy/stage2`.

    python eval.py --list                                    # the benchmarks, and what they need
    python eval.py --model DIR --task pope --root eval       # one of them; all: those in --root
    python eval.py --model DIR --data mine.json --images DIR # your own questions

Under torchrun, ranks share the questions. Next: benchmarks/run.py.
"""
# cli first: it handles Ctrl-C during the slow imports
from cli import parse

from benchmarks.run import Options, evaluate
from benchmarks.tasks import describe
from training.distributed import main_distributed, start_world


def run():
    o = Options(**parse(Options))  # first, so that only one rank prints a wrong option
    start_world("cpu")             # gloo on any device: ranks exchange messages only
    if o.list:
        print(describe())
    else:
        evaluate(o)


if __name__ == "__main__":
    main_distributed(run)
