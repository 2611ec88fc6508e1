"""The report: result tables and executed notebooks as a folder of HTML pages."""

import os
import platform
import re
import shutil
from html import escape
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

import nbformat
from plotly.offline import get_plotlyjs

from ..files import ROOT, RUNS, locked, provenance
from .html import page
from .notebooks import run_notebook
from .parameters import NOTEBOOKS, question


def write_report(results: Path) -> Path:
    """Write data/runs/report/: notebook 17's tables of the rows in `results`, and a page for every executed notebook.

    They are those beside `results`, where a sweep wrote it, and otherwise the committed ones. Returns the first page.
    """
    if not results.is_file():
        raise ValueError(f"{results} is no file; needed: rows of results, as data/results/mnist.csv")
    executed = [path for path in sorted(results.parent.glob("[!.]*.ipynb")) if ".failed" not in path.suffixes]
    folder, aside = RUNS / "report", RUNS / ".report.partial"
    with locked(folder):
        shutil.rmtree(aside, ignore_errors=True)  # of a report that was killed
        try:
            tables = run_notebook("17_results_tables", {"results": os.path.relpath(results, ROOT)})
            aside.mkdir(parents=True)
            links = []
            for path in executed or sorted(NOTEBOOKS.glob("*.ipynb")):
                notebook = nbformat.read(path, as_version=4)
                (aside / f"{path.stem}.html").write_text(page(notebook, library="directory"), encoding="utf-8")
                links.append(f"- [{escape(path.stem)}]({quote(path.stem)}.html) {escape(question(path))}")
            copies = [Path(shutil.copy(path, aside)).name for path in sorted(results.parent.glob("[!.]*.csv"))]
            links += ["", "Rows: " + ", ".join(f"[{escape(name)}]({quote(name)})" for name in copies)]
            notebook = nbformat.read(tables, as_version=4)
            notebook.cells.insert(1, nbformat.v4.new_markdown_cell("\n".join(["## Executed notebooks", "", *links])))
            notebook.cells.append(nbformat.v4.new_markdown_cell(_environment()))
            first = page(notebook, library="directory", exclude_input=True, exclude_output_prompt=True)
            (aside / "index.html").write_text(first, encoding="utf-8")
            (aside / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder / "index.html"


def _environment() -> str:
    """Commit, machine and versions, in Markdown."""
    needed = [re.match(r"[\w-]+", line)[0] for line in metadata.requires("apudae") or [] if "extra ==" not in line]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in needed)
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return f"## Environment\n\nCommit {provenance()['commit']}; {machine}; {versions}."
