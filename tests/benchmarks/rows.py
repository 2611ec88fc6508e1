"""What the benchmarks share: times taken in turn, rows of them, the table that each run prints."""

import statistics
from collections.abc import Callable

import pandas as pd
import torch

from apudae import files
from apudae.evaluation.pages import benchmark_table
from apudae.evaluation.results import Stopwatch, device_name

IDENTITY = ["benchmark", "name", "library", "dataset", "n", "device"]  # a new row replaces one that agrees in these


def timings(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, in turn, so that a drift of the machine's speed meets all alike."""
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            with Stopwatch() as watch:
                call()
            times[name].append(watch.seconds)
    return times


def time_row(
    benchmark: str, name: str, times: list[float], n: int, device: str | torch.device = "cpu", **facts
) -> dict:
    """A row: the median of `times` for each of `n` images, in milliseconds, and how far they spread about it."""
    median = statistics.median(times)
    row = {"benchmark": benchmark, "name": name, "library": "ours", "n": n, "repeats": len(times)}
    row |= {"ms_per_image": round(1000 * median / n, 4), "spread": round((max(times) - min(times)) / median, 3)}
    return row | {"device": device_name(device), "threads": torch.get_num_threads(), **files.provenance()} | facts


def keep(rows: list[dict]) -> None:
    """Print `rows` as a table, where they are times, and add them to data/results/benchmarks.csv."""
    new = pd.DataFrame(rows)
    if "ms_per_image" in new and "psnr" not in new:
        print(benchmark_table(new))
    path = files.RESULTS / "benchmarks.csv"
    with files.locked(path), files.written_aside(path) as aside:
        kept = [pd.read_csv(path, keep_default_na=False, dtype=str)] if path.is_file() else []
        table = pd.concat([*kept, new.astype(object).where(new.notna(), "").astype(str)])
        table.drop_duplicates(IDENTITY, keep="last").to_csv(aside, index=False)
