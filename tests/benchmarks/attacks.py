"""Time per image of our attacks and of foolbox's and torchattacks' at equal parameters, as ratios in one run.

    python tests/benchmarks/attacks.py [images] [repeats]

Prints a table and writes rows to data/results/benchmarks.csv. A ratio above 1 means that ours is faster.
"""

import statistics
import sys
from pathlib import Path

import pandas as pd
import torch

from apudae.datasets import take
from apudae.evaluation.results import Stopwatch

sys.path.insert(0, str(Path(__file__).parents[1] / "attacks"))
import peers

import apudae
from apudae import files


def main(n: int = 500, repeats: int = 5) -> None:
    x, y = take(apudae.load_dataset("mnist5k", "test"), n)
    model = apudae.load_model("mnist/classifier")
    libraries = {"ours": peers.ours(), "foolbox": peers.foolbox(), "torchattacks": peers.torchattacks()}
    rows = []
    for name in peers.ours():
        seconds = {library: [] for library in libraries if name in libraries[library]}
        for _ in range(repeats):  # in turn, so that a drift of the machine's speed meets all alike
            for library in seconds:
                with Stopwatch() as watch:
                    libraries[library][name](model, x, y)
                seconds[library].append(watch.seconds)
        medians = {library: statistics.median(times) for library, times in seconds.items()}
        for library, median in medians.items():
            rows.append(
                {"benchmark": "attack", "name": name, "library": library, "dataset": "mnist5k", "n": n}
                | {"repeats": repeats, "ms_per_image": round(1000 * median / n, 4)}
                | {"times_ours": round(median / medians["ours"], 2), "device": "cpu"}
                | {"threads": torch.get_num_threads(), **files.provenance()}
            )
            figures = f"{1000 * median / n:9.3f} ms/image {rows[-1]['times_ours']:7.2f} × ours"
            print(f"{name:10s} {library:13s} {figures}")
    keep(rows)


def keep(rows: list[dict]) -> None:
    """Add rows to data/results/benchmarks.csv; one replaces the former of the same measurement."""
    path = files.RESULTS / "benchmarks.csv"
    with files.locked(path), files.written_aside(path) as aside:
        kept = [pd.read_csv(path, keep_default_na=False)] if path.is_file() else []
        same = ["benchmark", "name", "library", "dataset", "n", "device"]
        pd.concat([*kept, pd.DataFrame(rows)]).drop_duplicates(same, keep="last").to_csv(aside, index=False)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
