"""Every decimal in the prose has a source: an output of its notebook, a committed row, or the log where it is named."""

import csv
import re

import nbformat
import pytest

from apudae.files import RESULTS, ROOT

MARKED = re.compile(r"<!-- table: .*?<!-- end of table -->", re.DOTALL)
DECIMAL = re.compile(r"(?<![\w.])-?(\d*\.\d+)(?![\d\w]| ?\\cdot)( ?%)?")
MEASURED = ("accuracy", "ci_low", "ci_high", "mean", "mean_low", "mean_high", "voted", "epsilon", "step_size")
TOLD = ("attack_parameters", "purifier_parameters", "command")
PLACES = range(1, 6)


def rounded(text):
    """The ways to write a number: plain decimals without a leading zero."""
    try:
        value = abs(float(text))
    except ValueError:
        return set()
    return {f"{value:.{places}f}".lstrip("0") for places in PLACES}


def facts_of(prose):
    """What the sidecars of the checkpoints say that are named."""
    paths = [ROOT / "data/checkpoints" / f"{name}.json" for name in re.findall(r"`([\w-]+/[\w-]+)`", prose)]
    return [path.read_text(encoding="utf-8") for path in paths if path.is_file()]


def rows_of(notebook, names):
    """The committed rows that this notebook wrote, and those of the files that are named."""
    for path in RESULTS.glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as lines:
            yield from (row for row in csv.DictReader(lines) if path.name in names or row.get("notebook") == notebook)


def known(texts, rows):
    """All decimals in texts and rows, rounded."""
    rows = list(rows)
    texts = [*texts, *(row.get(column) or "" for row in rows for column in TOLD)]
    numbers = {row.get(column) or "" for row in rows for column in MEASURED}
    numbers |= {found for text in set(texts) for found in re.findall(r"\d*\.?\d+(?:e-?\d+)?", text)}
    return set().union(*map(rounded, numbers))


def without_source(prose, found):
    """The decimals of `prose` that are not among those `found`; 96.5 % is .965, or a figure of that name."""
    missing = []
    for digits, percent in DECIMAL.findall(prose):
        share = f"{float(digits) / 100:.{len(digits.split('.')[1]) + 2}f}".lstrip("0") if percent else ""
        if not {digits.lstrip("0"), share} & found:
            missing.append(digits + percent)
    return missing


def shown(cell):
    """The source of a code cell and what it printed."""
    yield cell.source
    for output in cell.get("outputs", []):
        yield output.get("text") or output.get("data", {}).get("text/plain", "")


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_what_we_saw(path):
    cells = nbformat.read(path, 4).cells
    prose = "\n".join(cell.source for cell in cells if cell.source.startswith("## What we saw"))
    assert prose, "every notebook says what was seen"
    texts = [text for cell in cells if cell.cell_type == "code" for text in shown(cell)]
    texts += [cell.source for cell in cells if cell.cell_type == "markdown" and cell.source not in prose]
    log = [(ROOT / "LOG.md").read_text(encoding="utf-8")] if "LOG.md" in prose else []
    names = {"paper.csv"} | set(re.findall(r"[\w-]+\.csv", "\n".join([prose, *texts])))
    assert without_source(prose, known(texts + log + facts_of(prose), rows_of(path.stem, names))) == []


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.md")), ids=lambda path: path.name)
def test_pages(path):
    text = path.read_text(encoding="utf-8")
    names = {"paper.csv"} | set(re.findall(r"[\w-]+\.csv", text))
    log = [(ROOT / "LOG.md").read_text(encoding="utf-8")] if "LOG.md" in text else []
    assert without_source(MARKED.sub("", text), known(log, rows_of("", names))) == []


def test_readme():
    """README takes its figures from its table, and from the pages and the log that it links."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = [path.read_text(encoding="utf-8") for path in [ROOT / "LOG.md", *RESULTS.glob("*.md")]]
    prose = re.sub(r"Python \d\.\d+", "", MARKED.sub("", text))
    assert without_source(prose, known([*MARKED.findall(text), *linked], [])) == []


def test_a_decimal_without_a_source_is_found():
    assert without_source("It keeps .731 of them, 12.5 % and α = .01.", known(["0.7312 0.125"], [])) == [".01"]


def test_the_log_is_newest_first_and_its_index_has_every_entry_once():
    text = (ROOT / "LOG.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## (\d{4}-\d\d-\d\d) · (.+)$", text, re.MULTILINE)
    assert text.count("\n## ") == len(entries) + 1, "a date and a title in each heading but the index's"
    assert [date for date, _ in entries] == sorted((date for date, _ in entries), reverse=True)
    linked = re.findall(r"\[([^]]+)\]\(#(.+?)\)", text)
    anchors = {re.sub(r"[^\w\- ]", "", f"{date} · {title}".lower()).replace(" ", "-"): title for date, title in entries}
    assert sorted((anchor, title) for title, anchor in linked) == sorted(anchors.items())
