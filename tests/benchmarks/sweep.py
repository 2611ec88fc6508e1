"""What two cores give over one on a graph of independent notebooks, and what the engine costs over papermill alone.

    python tests/benchmarks/sweep.py [notebooks] [repeats]

Runs on a copy of the repository with one notebook, which multiplies matrices for about ten seconds of one core, or does
nothing. Prints a table and writes rows to data/results/benchmarks.csv: `seconds` of a whole sweep, of a papermill
command, or of one more empty notebook in a sweep on one core; `times_one_core`: throughput; `over_papermill`: seconds.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from rows import keep

from apudae import files
from apudae.evaluation.results import Stopwatch

PARAMETERS = """products: int = 0  # of matrices
run: str = "default"  # folder below data/runs/"""
WORK = "import torch\n\nfor _ in range(products):\n    torch.rand(1000, 1000) @ torch.rand(1000, 1000)"
SWEEP = [sys.executable, "-c", "from apudae.batch.cli import main; main()", "sweep"]


def copy_repository(copy: Path) -> None:
    for folder in ("apudae", "workflow"):
        shutil.copytree(files.ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "notebooks").mkdir()
    cells = [new_markdown_cell("# 00 · Work\n\n**Question.** How long?")]
    cells += [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(WORK)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), copy / "notebooks" / "00_work.ipynb")


def seconds(command: list[str], copy: Path, cores: set[int]) -> float:
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    with Stopwatch() as watch:
        subprocess.run(
            command,
            cwd=copy,
            env=environment,
            check=True,
            capture_output=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    return watch.seconds


def sweep(copy: Path, notebooks: int, products: int, cores: set[int]) -> float:
    """Seconds of a sweep from nothing; it takes the cores that it is allowed."""
    shutil.rmtree(copy / "data" / "runs", ignore_errors=True)
    step = {"notebook": "00_work", "parameters": {"products": products}}
    (copy / "graph.yaml").write_text(yaml.safe_dump({"steps": {f"work_{i}": step for i in range(notebooks)}}))
    return seconds([*SWEEP, "graph.yaml"], copy, cores)


def main(notebooks: int = 8, repeats: int = 3, products: int = 500) -> None:
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        sys.exit("needs two cores")
    one, two = set(available[:1]), set(available[:2])
    papermill = [sys.executable, "-m", "papermill", "notebooks/00_work.ipynb", "out.ipynb", "--cwd", "notebooks"]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_repository(copy)
        calls = {
            "work, one core": lambda: sweep(copy, notebooks, products, one),
            "work, two cores": lambda: sweep(copy, notebooks, products, two),
            "many": lambda: sweep(copy, notebooks, 0, one),
            "single": lambda: sweep(copy, 1, 0, one),
            "papermill": lambda: seconds(papermill, copy, one),
        }
        times = {name: [] for name in calls}
        for _ in range(repeats):  # in turn, so that a drift of the machine's speed meets all alike
            for name, call in calls.items():
                times[name].append(call())
    median = {name: statistics.median(found) for name, found in times.items()}
    more = (median["many"] - median["single"]) / (notebooks - 1)
    found = [
        ("work, one core", "ours", median["work, one core"], {"times_one_core": 1.0}),
        ("work, two cores", "ours", median["work, two cores"], {}),
        ("empty, one", "papermill", median["papermill"], {"over_papermill": 0.0}),
        ("empty, one more", "ours", more, {"over_papermill": round(more - median["papermill"], 2)}),
        ("empty, sweep of one", "ours", median["single"], {}),
    ]
    found[1][3]["times_one_core"] = round(median["work, one core"] / median["work, two cores"], 2)
    rows = []
    for name, library, taken, facts in found:
        rows.append(
            {"benchmark": "sweep", "name": name, "library": library, "dataset": "", "n": notebooks, "repeats": repeats}
            | {"seconds": round(taken, 2), **facts, "device": "cpu", "threads": 1, **files.provenance()}
        )
        print(f"{name:20s} {library:10s} {taken:8.2f} s  {facts}", flush=True)
    keep(rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
