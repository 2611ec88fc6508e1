"""The tables of README and of the pages in data/results/, made from rows: each stands between markers that say which.

python -m apudae.evaluation.pages    # writes them
"""

import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import pandas as pd

from ..contracts import check_known
from ..datasets import look_up
from ..files import RESULTS, ROOT, written_aside
from ..purification.config import PRESETS
from .results import read_results
from .tables import PLAIN, main_table, of_study, published, with_interval

FILES = ("mnist-adaptive.csv", "cifar10-jpeg.csv")
SHOWN = 0.1
NAMED = {"none": "no purifier", "magnet": "MagNet's reformer", "defense_gan": "Defense-GAN"}
MARK = re.compile(r"^<!-- (?:table: (?P<table>.*?)|end of table) -->(?=[ \t\r]*$)", re.MULTILINE)
PEERS = ("authors' loop", "foolbox", "torchattacks", "floor", "papermill")
DEFENSE = ["dataset", "classifier", "dae", "purifier", "step_size", "steps"]


def suite_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each defense, on the same images: clean, what the gray box leaves, what the whole suite leaves.

    The gray box is all attacks of the suite on the classifier alone. Of several suites the one on the most images, of
    these the lower. Where the defense is random, figures are means over the draws that judge. `budget` is the suite's,
    "" where it is older than these.
    """
    lines = []
    rows = rows[rows.kind.isin(["ladder", "worst_case"])].fillna({"step_size": 0, "steps": 0})
    rows = rows.assign(budget=[json.loads(text).get("budget", "") for text in rows.attack_parameters])
    for defense, own in rows.groupby(DEFENSE, sort=False, dropna=False):
        last = own[own.kind == "worst_case"].sort_values(["n", "accuracy"], ascending=[False, True]).iloc[0]
        suite = own[(own.kind == "ladder") & (own.n == last.n) & (own.budget == last.budget)]  # resumed: of two commits
        gray = suite[suite.attack.str.startswith("gray_")].sort_values("position").tail(1)
        parts = {"clean": suite[suite.attack == "clean"].tail(1), "gray box": gray, "worst case": last.to_frame().T}
        cells = {name: with_interval(part).iloc[0] if len(part) else "–" for name, part in parts.items()}
        lines.append(dict(zip(DEFENSE, defense, strict=True)) | cells)
        lines[-1] |= {"images": int(last.n), "budget": last.budget}
    return pd.DataFrame(lines)


def headline() -> str:
    """The table in Markdown, without what the gray box leaves less than a tenth of images (no purifier: all the same).

    The data set's own networks first, then others; purifiers as in `PRESETS`.
    """
    lines = ["| | clean | gray box | **worst case** | images |", "|---|---|---|---|---|"]
    for name in FILES:
        table = suite_table(read_results(RESULTS / name).query("split == 'test'"))
        entry = look_up(table.dataset.iloc[0])
        lines.append(f"| **{table.dataset.iloc[0]}, ε = {entry.budget.epsilon:.3g}** | | | | |")
        place = table.purifier.str.split().str[0].map(["none", *PRESETS, *NAMED].index)
        foreign = (table.classifier != entry.classifier).astype(int) * 2
        foreign += ((table.dae != entry.dae) & (table.purifier != "none")).astype(int)
        table = table.iloc[(100 * foreign + place).argsort(kind="stable")]
        weak = table["gray box"].str[:5].replace("–", "0").astype(float) < SHOWN
        for line in table[~weak | (table.purifier == "none")].to_dict("records"):
            cells = [line["clean"], line["gray box"], f"**{line['worst case']}**", str(line["images"])]
            lines.append("| " + " | ".join([_label(line, entry), *cells]) + " |")
    return "\n".join(lines)


def _label(line: dict, entry: object) -> str:
    words = [NAMED.get(line["purifier"], line["purifier"])]
    far = line["step_size"] and abs(line["step_size"] - entry.budget.step_size) > 1e-6
    words += [f"α = {line['step_size']:.2g}"] if far else []
    words += [f"n = {line['steps']:.0f}"] if line["steps"] not in (0, 15) else []
    words += [f"`{line['dae']}`"] if line["purifier"] not in NAMED and line["dae"] != entry.dae else []
    words += [f"classifier `{line['classifier']}`"] if line["classifier"] != entry.classifier else []
    return ", ".join(words) + " †" * (line["budget"] not in ("full", "double"))


def gray_box(
    name: str, classifier: str, dae: str, steps: str = "15", step_size: str = "0.01", metric: str = "top-1"
) -> str:
    """`gray_box_table` of the rows in data/results/`name`; `steps`: n, several separated by commas, or "" for none.

    Attacks that no purifier has met are left out.
    """
    every, wanted = read_results(RESULTS / name), [int(text) for text in steps.split(",") if text]
    for column, word in {"classifier": classifier, "dae": dae, "metric": metric}.items():
        check_known(f"{column} of {name}", word, every[column].unique())
    rows = of_study(every, classifier, dae, wanted, float(step_size), metric)
    if missing := [n for n in wanted if n not in rows.steps.to_list()]:
        raise ValueError(f"{name} has no row of this study with n = {missing[0]} and α = {float(step_size):g}")
    if not set(rows.purifier) - {"none"}:
        raise ValueError(f"{name} has no purifier before {classifier} with {dae}")
    drawn = main_table(rows)[0]
    return gray_box_table(drawn[drawn.attack.isin(drawn[drawn.purifier != "none"].attack)], metric)


def gray_box_table(drawn: pd.DataFrame, metric: str = "top-1") -> str:
    """Attack × purifier in Markdown, of the rows of `main_table`.

    Bold: the best of a line, and what its interval does not tell from it. "(200)": so many images, fewer than most.
    The paper's figures stand beside those of its own metric alone.
    """
    dataset, purifiers, most = drawn.dataset.iloc[0], list(dict.fromkeys(drawn.purifier)), drawn.n.mode().max()
    theirs = {"photographs": "top-10 of right"}.get(look_up(dataset).noun, "top-1")
    paper = published(dataset if metric == theirs else "")
    best = paper.drop(columns=[*PLAIN, "magnet", "defense_gan"], errors="ignore").max(axis=1)
    beside = {"paper: none": paper["none"], "paper: best": best} if len(paper) else {}
    headings = ["", *purifiers, *beside]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for attack, line in drawn.groupby("attack", sort=False):
        figures = line.set_index("purifier")
        top = figures.drop("none", errors="ignore").accuracy.max()
        cells = [_cell(figures.loc[one], top, most) if one in figures.index else "–" for one in purifiers]
        cells += [f"{found[attack]:.3f}" if pd.notna(found.get(attack)) else "–" for found in beside.values()]
        lines.append(f"| {attack} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(figure: pd.Series, top: float, most: int) -> str:
    text = f"{figure.accuracy:.3f}"
    text = f"**{text}**" if figure.ci_high >= top and figure.name != "none" else text
    return text + (f" ({figure.n})" if figure.n < most else "")


def benchmark_table(rows: pd.DataFrame) -> str:
    """Times of ours and of others, in Markdown: milliseconds an image, and in brackets how many times ours.

    `rows`: of data/results/benchmarks.csv, the last of each data set and name; the authors' loop and the floor are of a
    data set, "all variants" of which they stand beside. "labels kept": the share that is read as after the usual form.
    """
    rows = rows.fillna({"dataset": ""}).drop_duplicates(["device", "dataset", "name", "library"], keep="last")
    others = [name for name in PEERS if name in set(rows.library)]
    agreed = ["labels kept"] if "labels_agree" in rows and rows.labels_agree.notna().any() else []
    columns = ["n", "ours, ms an image", *others, *agreed]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for (device, dataset), own in rows.groupby(["device", "dataset"], sort=False):
        times = own.set_index(["library", "name"]).ms_per_image
        lines.append(f"| **{dataset}**, {device} |" + " |" * len(columns))
        for row in own[own.library == "ours"].itertuples():
            beside = [times.get((other, row.name), times.get((other, "all variants"))) for other in others]
            cells = ["–" if pd.isna(each) else f"{_short(each)} ({each / row.ms_per_image:.2g} ×)" for each in beside]
            cells += ["–" if pd.isna(row.labels_agree) else f"{row.labels_agree:.3f}" for _ in agreed]
            lines.append("| " + " | ".join([row.name, str(row.n), _short(row.ms_per_image), *cells]) + " |")
    return "\n".join(lines)


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def benchmarks(kind: str, *names: str) -> str:
    """`benchmark_table` of the committed rows of this kind; with `names`, of ours these alone."""
    rows = pd.read_csv(RESULTS / "benchmarks.csv").query("benchmark == @kind")
    return benchmark_table(rows[(rows.library != "ours") | rows.name.isin(names or rows.name)])


TABLES = {"suite": headline, "gray_box": gray_box, "benchmarks": benchmarks}


def pages() -> list[Path]:
    """README, the pages beside the rows, and that of the workflow, which says what things cost."""
    return [ROOT / "README.md", *sorted(RESULTS.glob("*.md")), ROOT / "workflow" / "README.md"]


def with_tables(text: str, page: str = "the page") -> str:
    """`text`, each table between markers made anew: <!-- table: KIND WORDS --> … <!-- end of table -->, a line each.

    ValueError, which names `page`, line and marker, for a marker without its other half and a table that cannot be.
    """
    marks, line_end = list(MARK.finditer(text)), "\r\n" if "\r\n" in text else "\n"
    pieces, end = [], 0
    for place, mark in enumerate(marks):
        where = f"{page}, line {text.count(chr(10), 0, mark.start()) + 1}, {mark[0].strip()}"
        starts = mark["table"] is not None
        if starts == bool(place % 2) or (starts and place + 1 == len(marks)):
            raise ValueError(f"{where}: its other marker is missing; needed: a start and an end by turns")
        if starts:
            try:
                table = _table(*shlex.split(mark["table"]))
            except (ValueError, OSError) as error:
                raise ValueError(f"{where}: {error}") from error
            pieces += [text[end : mark.end()], f"\n\n{table}\n\n".replace("\n", line_end)]
            end = marks[place + 1].start()
    return "".join([*pieces, text[end:]])


def _table(kind: str = "", *words: str) -> str:
    check_known("kind of table", kind, TABLES)
    try:
        inspect.signature(TABLES[kind]).bind(*words)
    except TypeError as error:
        raise ValueError(f"{kind}: {error}") from error
    return TABLES[kind](*words)


def main() -> None:
    """Write the tables into the pages."""
    for path in pages():
        with open(path, encoding="utf-8", newline="") as file:  # whose line ends stay
            text = with_tables(file.read(), path.name)
        with written_aside(path) as aside:
            aside.write_text(text, encoding="utf-8", newline="")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"apudae: {error}")
