"""One step of a sweep, in its own process: `python -m apudae.batch.step STEP PARENT` in the sweep's folder."""

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..files import RUNS, locked
from ..processes import die_with_parent
from . import RESULTS, NotebookError
from .notebooks import run_notebook


@contextmanager
def gpu_place(places: list[str], count: int = 1) -> Iterator[str]:
    """Hold `count` of `places` ("<GPU>.<number>": locks, freed when their holder dies) at once, and name their GPUs."""
    while True:
        with ExitStack() as stack:
            held = []
            for place in places:
                gpu = place.rpartition(".")[0]
                if len(held) < count and gpu not in held:
                    lock = stack.enter_context(open(RUNS / f".gpu.{os.uname().nodename}.{place}.lock", "w"))
                    with suppress(BlockingIOError):
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        held.append(gpu)
            if len(held) == count:
                yield ",".join(held)
                return
        time.sleep(1)


def run_step(name: str) -> None:
    """Run the step `name` of the sweep in the current folder."""
    sweep = json.loads(Path("steps.json").read_text(encoding="utf-8"))
    if name == RESULTS:
        from ..evaluation.results import merge_results  # torch, which takes seconds, is the notebooks' alone

        return merge_results([Path(f"{step}.csv") for step in sweep["merged"]], Path("results.csv"), Path("tables.csv"))
    step = sweep["steps"][name]
    with ExitStack() as stack:
        stack.enter_context(locked(Path(name)))  # on a cluster, a job may outlive a launcher that was killed
        if step["writes_rows"]:
            Path(f"{name}.csv").unlink(missing_ok=True)  # rows of other parameters would stay
        gpus = {}
        if step["gpu"] and sweep["gpu_places"]:
            gpus["CUDA_VISIBLE_DEVICES"] = stack.enter_context(gpu_place(sweep["gpu_places"], step["gpu"]))
        run_notebook(step["notebook"], step["parameters"], Path.cwd() / f"{name}.ipynb", gpus)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    try:
        run_step(sys.argv[1])
    except (ValueError, NotebookError, OSError) as error:
        sys.exit(f"apudae: {error}")
