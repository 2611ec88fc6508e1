"""Time per image of our attacks and of foolbox's and torchattacks' at equal parameters, as ratios in one run.

    python tests/benchmarks/attacks.py [images] [repeats]

Prints a table and writes rows to data/results/benchmarks.csv.
"""

import sys
from functools import partial
from pathlib import Path

from rows import keep, time_row, timings

from apudae.datasets import take

sys.path.insert(0, str(Path(__file__).parents[1] / "attacks"))
import peers

import apudae


def main(n: int = 500, repeats: int = 5) -> None:
    x, y = take(apudae.load_dataset("mnist5k", "test"), n)
    model = apudae.load_model("mnist/classifier")
    libraries = {"ours": peers.ours(), "foolbox": peers.foolbox(), "torchattacks": peers.torchattacks()}
    rows = []
    for name in peers.ours():
        calls = {each: partial(known[name], model, x, y) for each, known in libraries.items() if name in known}
        rows += [
            time_row("attack", name, times, n, library=library, dataset="mnist5k")
            for library, times in timings(calls, repeats).items()
        ]
    keep(rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
