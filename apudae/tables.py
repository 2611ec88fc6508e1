"""Result rows, the CSV files of `data/results/` that keep them, and what the paper reports beside them."""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from .attacks import PAPER, UNCLIPPED, family
from .baselines import ProjectionConfig
from .files import RESULTS, RUNS, load_tensors, locked, provenance, written_aside
from .purify import PRESETS, PurifyConfig

# a new row replaces the row that agrees in all of these
IDENTITY = ["dataset", "split", "n", "metric", "classifier", "dae", "attack", "attack_parameters"]
IDENTITY += ["purifier", "purifier_parameters", "seed", "device"]
VOLATILE = ["device", "seconds", "commit", "command"]  # columns that may differ between two runs of the same


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `n` images, with the 95 % Wilson score interval; `others`: the same by other metrics, by name."""

    correct: int
    n: int
    others: dict[str, "Accuracy"] = field(default_factory=dict, compare=False, repr=False)

    @property
    def value(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson score interval (Wilson 1927), which stays in [0, 1] and is sensible at 0 and at 1."""
        z = 1.959964
        centre = self.value + z**2 / (2 * self.n)
        half = z * math.sqrt(self.value * (1 - self.value) / self.n + z**2 / (4 * self.n**2))
        return max(0.0, (centre - half) / (1 + z**2 / self.n)), min(1.0, (centre + half) / (1 + z**2 / self.n))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"


def result_row(
    measured: Accuracy,
    *,
    dataset: str,
    classifier: str,
    attack: str,
    attack_parameters: dict,
    purifier: str = "none",
    purifier_config: PurifyConfig | ProjectionConfig | None = None,
    dae: str = "",
    split: str = "test",
    seed: int = 0,
    device: str = "cpu",
    seconds: float = 0.0,
) -> dict:
    """One row of results: what was measured on what, how well, how long, where and by which command.

    "others" are the figures by other metrics than top-1, if there are any: `record` makes rows of them.
    """
    row = {
        "dataset": dataset,
        "split": split,
        "n": measured.n,
        "metric": "top-1",
        "classifier": classifier,
        "dae": dae,
        "attack": attack,
        "attack_parameters": json.dumps(_without_infinity(attack_parameters), sort_keys=True),
        "purifier": purifier,
        "purifier_parameters": json.dumps(asdict(purifier_config) if purifier_config else {}, sort_keys=True),
        "seed": seed,
        "device": device_name(device),
        **_figures(measured),
        "seconds": round(seconds, 2),
        **provenance(),
    }
    return row | {"others": measured.others} if measured.others else row


def _figures(measured: Accuracy) -> dict:
    low, high = (round(end, 5) for end in measured.interval)
    accuracy = round(measured.value, 5)
    return {"n": measured.n, "correct": measured.correct, "accuracy": accuracy, "ci_low": low, "ci_high": high}


def _without_infinity(parameters: dict) -> dict:
    return {name: "inf" if value == math.inf else value for name, value in parameters.items()}  # JSON has none


def device_name(device: str | torch.device) -> str:
    """ "cpu", or the name of the GPU."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Stopwatch:
    """`with Stopwatch() as watch: …` then `watch.seconds`; waits for CUDA to finish."""

    def __enter__(self) -> "Stopwatch":
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._start


def record(path: Path, rows: Iterable[dict]) -> pd.DataFrame:
    """Add `rows` to the CSV file `path`; a row replaces one of the same identity. Safe beside other writers.

    The last rows of the table that it returns are `rows`, by top-1; before them stand those by their other metrics.
    """
    rows = [dict(row) for row in rows]
    others = [(row, row.pop("others", {})) for row in rows]
    others = [row | _figures(found) | {"metric": metric} for row, more in others for metric, found in more.items()]
    new = pd.DataFrame([*others, *rows]).astype(str)
    with locked(path), written_aside(path) as aside:
        kept = [_read(path)] if path.is_file() else []
        table = pd.concat([*kept, new], ignore_index=True).drop_duplicates(IDENTITY, keep="last")
        table.to_csv(aside, index=False)
    return read_results(path)


def read_results(path: Path) -> pd.DataFrame:
    """The rows of a results file; only its figures are numbers (a commit such as 12345678e9 stays text)."""
    whole, real = ["n", "seed", "correct"], ["accuracy", "ci_low", "ci_high", "seconds"]
    numbers = dict.fromkeys(whole, int) | dict.fromkeys(real, float)
    table = _read(path)
    return table.astype({name: kind for name, kind in numbers.items() if name in table})


def _read(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, keep_default_na=False, dtype=str)
    return table if "metric" in table else table.assign(metric="top-1")  # files of before there were others


def published(dataset: str) -> pd.DataFrame:
    """What the paper reports for a data set (by the start of its name): accuracy, attack × purifier; empty if nothing.

    From Tables 1 and 3; "best" is that table's "APuDAE (Best)" where it does not say which variant it is.
    """
    rows = pd.read_csv(RESULTS / "paper.csv")
    rows = rows[[dataset.startswith(name) for name in rows.dataset]]
    return rows.pivot(index="attack", columns="purifier", values="accuracy").loc[
        rows.attack.unique(), rows.purifier.unique()
    ]


def merge_results(paths: Iterable[Path], merged: Path, stable: Path) -> None:
    """Write the rows of `paths`, sorted, to `merged`, and of these the columns in which all runs agree to `stable`."""
    rows = pd.concat([read_results(path) for path in paths]).sort_values(IDENTITY, kind="stable")
    rows = rows.drop_duplicates(IDENTITY)  # several notebooks show the undefended classifier
    for path, table in {merged: rows, stable: rows.drop(columns=VOLATILE).drop_duplicates()}.items():
        with written_aside(path) as aside:
            table.to_csv(aside, index=False)


def pivot(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of results as a table attack × purifier of "accuracy [interval]", in the order of the rows."""
    cells = [str(Accuracy(correct, n)) for correct, n in zip(rows.correct, rows.n, strict=True)]
    table = rows.assign(cell=cells).pivot(index="attack", columns="purifier", values="cell")
    return table.loc[rows.attack.unique(), rows.purifier.unique()].rename_axis(index=None, columns="attack")


def with_interval(rows: pd.DataFrame) -> pd.Series:
    """Each row's figure as text, "accuracy [low, high]"."""
    figures = rows[["accuracy", "ci_low", "ci_high"]].astype(object).map("{:.3f}".format)  # objects: there may be none
    return figures.accuracy + " [" + figures.ci_low + ", " + figures.ci_high + "]"


def _of_ladder(rows: pd.DataFrame) -> pd.Series:
    return rows.attack_parameters.str.contains('"after"|"rungs"')


def _of_the_papers_size(rows: pd.DataFrame, dataset: str) -> pd.Series:
    """Whether a row's attack has the paper's ε, or none."""
    sizes = {name: attack["epsilon"] for name, attack in PAPER[family(dataset)].items()}
    sizes["counter_attack_a"] = sizes["bim"]
    given = rows.attack_parameters.map(lambda text: json.loads(text).get("epsilon")).astype(float)
    wanted = rows.attack.map(sizes).astype(float)
    return given.isna() | wanted.isna() | given.round(6).eq(wanted.round(6))


def of_study(
    rows: pd.DataFrame, classifier: str, dae: str, steps: list[int], step_size: float, metric: str = "top-1"
) -> pd.DataFrame:
    """The rows on test images of a classifier, undefended or behind an autoencoder with these n and this α.

    Of several `steps`, purifiers with all but the first name theirs, such as "A (n = 12)". Fewest images first.
    """
    rows = rows[(rows.split == "test") & (rows.metric == metric) & (rows.classifier == classifier)]
    rows = rows[rows.dae.isin([dae, ""])]
    config = pd.DataFrame(map(json.loads, rows.purifier_parameters), rows.index, ["steps", "step_size"])
    plain = rows.purifier.str.split().str[0].isin(["none", "direct"])  # these have neither n nor α
    wanted = plain | config.steps.isin(steps) & (config.step_size - step_size).abs().lt(1e-9)
    number = config.steps.map(" (n = {:.0f})".format).where(~plain & (config.steps != steps[0]), "")
    return rows.assign(purifier=rows.purifier + number)[wanted].sort_values("n", kind="stable")


def main_table(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Table 1 from the rows `of_study`: each attack's and purifier's row on the most images, and the table of them.

    Attacks of another ε than the paper's are left out.
    The purifier "adversarial" is none at all, before a classifier that was trained on attacked images.
    Marked " ✗": below the best that the paper reports of its purifiers; " ≈": below, but with that inside the interval.
    The paper's columns stand beside ours.
    """
    dataset = "".join(rows.dataset.head(1))
    rows = rows[~_of_ladder(rows) & _of_the_papers_size(rows, dataset)]
    rows = rows.drop_duplicates(["attack", "purifier"], keep="last")
    paper, every = published(dataset), ["clean", *PAPER["imagenet"], "counter_attack_a"]
    rows = rows[rows.attack.isin(every)]
    attacks, order = [name for name in every if name in set(rows.attack)], ["none", "adversarial", *PRESETS]
    purifiers = sorted(rows.purifier.unique(), key=lambda name: (order.index(name.split()[0]), name))
    others = ["none", "direct", "adversarial", "magnet", "defense_gan"]
    best = paper.drop(columns=others, errors="ignore").max(axis=1)
    goal = rows.attack.map(best).where(~rows.purifier.isin(order[:2]))
    below = goal.gt(rows.accuracy)
    marks = below.map({True: " ✗", False: ""}).where(~(below & goal.le(rows.ci_high)), " ≈")
    cells = rows.assign(cell=with_interval(rows) + marks).pivot(index="attack", columns="purifier", values="cell")
    cells = cells.loc[attacks, purifiers].fillna("–")
    counts = rows.groupby("attack").n.agg(["min", "max"]).reindex(attacks)
    images = [f"{low}" if low == high else f"{low}–{high}" for low, high in counts.itertuples(index=False)]
    beside = paper.add_suffix(" (paper)").reindex(attacks).astype(object).fillna("–")
    place = rows.attack.map(attacks.index) * 100 + rows.purifier.map(purifiers.index)
    return rows.loc[place.sort_values().index], cells.assign(images=images).join(beside).rename_axis(
        index=None, columns=None
    )


def knowing_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Table 3, extended, from rows `of_study`: counter-attacks by themselves, the paper's figures, rung after rung.

    A column of the ladder is what its rung and those before it leave; counter-attack B is at its strongest β.
    """
    dataset, rung = "".join(rows.dataset.head(1)), _of_ladder(rows)
    alone = rows.attack.map({"counter_attack_a": "A alone", "counter_attack_b": "B alone"}).astype(object)
    rows = rows.assign(column=rows.attack.where(rung, alone)).dropna(subset="column")
    rows = rows.sort_values(["n", "accuracy"], ascending=[False, True]).drop_duplicates(["purifier", "column"])
    after = rows.attack_parameters.map(lambda text: json.loads(text).get("after", 99)).astype(int)
    columns = ["A alone", "B alone", *rows.assign(after=after)[after < 99].sort_values("after").column.unique()]
    cells = rows.assign(cell=with_interval(rows)).pivot(index="purifier", columns="column", values="cell")
    cells, paper = cells.reindex(columns=[*columns, "worst_case"]).astype(object).fillna(""), published(dataset)
    for name in [name for name in ("A", "B") if f"counter_attack_{name.lower()}" in paper.index]:
        figures = paper.loc[f"counter_attack_{name.lower()}"].drop("none", errors="ignore").dropna()
        given = [figures.get(purifier, "" if purifier == "none" else figures.max()) for purifier in cells.index]
        cells.insert(list(cells.columns).index(f"{name} alone") + 1, f"{name} (paper)", given)
    return cells.assign(images=rows.groupby("purifier").n.max()).rename_axis(index=None, columns=None).T


def side_by_side(gray: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    """Of each purifier: clean images, its lowest row of the gray box, and what attackers who know it leave.

    `gray` is the rows of `main_table`, `known` rows `of_study` with the ladder's. Attacks that leave the ε-ball do not
    count.
    """
    lowest = gray[~gray.attack.str.contains(UNCLIPPED) & ~gray.attack.isin(["clean", "random", "counter_attack_a"])]
    lowest = lowest.loc[lowest.groupby("purifier", sort=False).accuracy.idxmin()]
    last = known[known.attack == "worst_case"].sort_values(["n", "accuracy"], ascending=[False, True])
    parts = {"clean": gray[gray.attack == "clean"], "gray box": lowest, "worst case": last}
    parts = {name: part.drop_duplicates("purifier").set_index("purifier") for name, part in parts.items()}
    purifiers = dict.fromkeys([*gray.purifier, *last.purifier])
    cells = pd.DataFrame({name: with_interval(part) for name, part in parts.items()}, list(purifiers))
    cells.insert(1, "weakest against", parts["gray box"].attack)
    return cells.assign(images=parts["worst case"].n.astype("Int64")).astype(object).fillna("–")


def read_attacks(run: str, n: int, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], Tensor, dict]:
    """The first `n` images under every attack, as notebook 03 of that run wrote them, their labels, and its settings.

    Raises ValueError where they are missing or fewer.
    """
    advice = f"notebook 03 writes it: apudae run 03_attacks -p run {run}"
    tensors, settings = load_tensors(RUNS / run / "attacks.safetensors", advice)
    if n > len(tensors["labels"]):
        raise ValueError(f"{n} images asked for; the run {run!r} has {len(tensors['labels'])}; {advice} -p n {n}")
    settings.setdefault("classes", [str(digit) for digit in range(10)])  # files of before classes were kept
    attacked = {name: tensors[name][:n].to(device) for name in settings["attacks"]}
    return attacked, tensors["labels"][:n].to(device), settings
