"""Tables made from rows, and what the paper reports beside them."""

import math
from html import escape

import pandas as pd

from ..attacks import attack_settings, name_among
from ..datasets import look_up
from ..files import RESULTS
from ..purification.config import PRESETS
from .accuracy import Accuracy

PLAIN = ("none", "adversarial")  # columns of a classifier alone


def published(dataset: str) -> pd.DataFrame:
    """What the paper reports for a data set (by its entry in the registry): accuracy, attack × purifier; or nothing.

    From Tables 1 to 3; "best" is that table's "APuDAE (Best)" where it does not say which variant it is.
    """
    rows = pd.read_csv(RESULTS / "paper.csv")
    rows = rows[rows.dataset == (look_up(dataset).published if dataset else "")]
    return rows.pivot(index="attack", columns="purifier", values="accuracy").loc[
        rows.attack.unique(), rows.purifier.unique()
    ]


def labelled(rows: pd.DataFrame, epsilon: float | None = None) -> pd.DataFrame:
    """`rows`, each attack called by its ε too (`attacks.name_among`) where that is not `epsilon` or the data set's."""
    sizes = {name: epsilon or getattr(look_up(name).budget, "epsilon", None) for name in rows.dataset.unique()}
    facts = zip(rows.attack, rows.epsilon.astype(float), rows.dataset.map(sizes).astype(float), strict=True)
    return rows.assign(attack=pd.Series([name_among(*fact) for fact in facts], rows.index, dtype=object))


def pivot(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of results as a table attack × purifier of "accuracy [interval]", in the order of the rows."""
    table = rows.assign(cell=with_interval(rows)).pivot(index="attack", columns="purifier", values="cell")
    return table.loc[rows.attack.unique(), rows.purifier.unique()].rename_axis(index=None, columns="attack")


def with_interval(rows: pd.DataFrame) -> pd.Series:
    """Each row's figure as text, "accuracy [low, high]": of its count, as the row's own interval is rounded already.

    Where draws of a random defense judge (`ladder.WorstCase`), their mean and its interval.
    """
    drawn = rows.reindex(columns=["runs", "mean", "mean_low", "mean_high"]).astype(float)
    figures = zip(rows.correct, rows.n, *(drawn[name] for name in drawn), strict=True)
    texts = [
        f"{mean:.3f} [{low:.3f}, {high:.3f}]" if runs > 1 and not math.isnan(low) else str(Accuracy(correct, n))
        for correct, n, runs, mean, low, high in figures
    ]
    return pd.Series(texts, rows.index, dtype=object)


def of_study(
    rows: pd.DataFrame, classifier: str, dae: str, steps: list[int], step_size: float, metric: str = "top-1"
) -> pd.DataFrame:
    """The rows on test images of a classifier, undefended or with an autoencoder with these n and this α.

    Of several `steps`, purifiers with all but the first name theirs, such as "A (n = 12)". Fewest images first.
    """
    rows = rows[(rows.split == "test") & (rows.metric == metric) & (rows.classifier == classifier)]
    rows = rows[rows.dae.isin([dae, ""])]
    plain = rows.purifier.str.split().str[0].isin(["none", "JPEG", "direct"])  # these have neither n nor α
    wanted = plain | rows.steps.isin(steps) & (rows.step_size - step_size).abs().lt(1e-9)
    number = rows.steps.map(" (n = {:.0f})".format).where(~plain & ~rows.steps.isin(steps[:1]), "")
    return rows.assign(purifier=rows.purifier + number)[wanted].sort_values("n", kind="stable")


def main_table(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Table 1 from the rows `of_study`: each attack's and purifier's row on the most images, and the table of them.

    Attacks of another ε than the paper's are left out.
    The purifier "adversarial" is none at all, before a classifier that was trained on attacked images.
    Marked " ✗": below the best that the paper reports of its purifiers; " ≈": below, but with that inside the interval.
    The paper's columns stand beside ours.
    """
    dataset = "".join(rows.dataset.head(1))
    own = [*attack_settings(dataset)] if dataset and look_up(dataset).budget else [*rows.attack.unique()]
    every = [*dict.fromkeys(["clean", *own, "counter_attack_a"])]
    rows = labelled(rows[rows.kind == "attack"])
    rows = rows[rows.attack.isin(every)].drop_duplicates(["attack", "purifier"], keep="last")
    attacks = [name for name in every if name in set(rows.attack)]
    order, paper = [*PLAIN, "JPEG", *PRESETS], published(dataset)
    purifiers = sorted(rows.purifier.unique(), key=lambda name: (order.index(name.split()[0]), name))
    others = [*PLAIN, "direct", "magnet", "defense_gan"]
    best = paper.drop(columns=others, errors="ignore").max(axis=1)
    goal = rows.attack.map(best).where(~rows.purifier.isin(PLAIN))
    below = goal.gt(rows.accuracy)
    marks = below.map({True: " ✗", False: ""}).where(~(below & goal.le(rows.ci_high)), " ≈")
    cells = rows.assign(cell=with_interval(rows) + marks).pivot(index="attack", columns="purifier", values="cell")
    cells = cells.loc[attacks, purifiers].fillna("–")
    counts = rows.groupby("attack").n.agg(["min", "max"]).reindex(attacks)
    images = [f"{low}" if low == high else f"{low}–{high}" for low, high in counts.itertuples(index=False)]
    beside = paper.add_suffix(" (paper)").reindex(attacks).astype(object).fillna("–")
    order_of_rows = rows.attack.map(attacks.index) * 100 + rows.purifier.map(purifiers.index)
    return rows.loc[order_of_rows.sort_values().index], cells.assign(images=images).join(beside).rename_axis(
        index=None, columns=None
    )


def knowing_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Table 3, extended, from rows `of_study`: counter-attacks by themselves, the paper's figures, the attack suite.

    A column of the suite is what its attack and those before it leave; counter-attack B is at its strongest β.
    """
    dataset = "".join(rows.dataset.head(1))
    alone = rows.attack.map({"counter_attack_a": "A alone", "counter_attack_b": "B alone"}).astype(object)
    rows = rows.assign(column=rows.attack.mask(rows.kind == "attack", alone)).dropna(subset="column")
    rows = rows.sort_values(["n", "accuracy"], ascending=[False, True]).drop_duplicates(["purifier", "column"])
    columns = ["A alone", "B alone", *rows.dropna(subset="position").sort_values("position").column.unique()]
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
    lowest = gray[~gray.attack.str.endswith("@inf") & ~gray.attack.isin(["clean", "random", "counter_attack_a"])]
    lowest = lowest.loc[lowest.groupby("purifier", sort=False).accuracy.idxmin()]
    last = known[known.kind == "worst_case"].sort_values(["n", "accuracy"], ascending=[False, True])
    parts = {"clean": gray[gray.attack == "clean"], "gray box": lowest, "worst case": last}
    parts = {name: part.drop_duplicates("purifier").set_index("purifier") for name, part in parts.items()}
    purifiers = dict.fromkeys([*gray.purifier, *last.purifier])
    cells = pd.DataFrame({name: with_interval(part) for name, part in parts.items()}, list(purifiers))
    cells.insert(1, "weakest against", parts["gray box"].attack)
    return cells.assign(images=parts["worst case"].n.astype("Int64")).astype(object).fillna("–")


def folded(summary: str, table: pd.DataFrame) -> str:
    """A table as HTML that opens with a click on `summary`, its cells unbroken; "" if it is empty."""
    cells = table.fillna("").to_html(border=0).replace("<td>", '<td style="white-space: nowrap">')
    return f"<details><summary>{escape(summary)}</summary>{cells}</details>" if len(table) else ""
