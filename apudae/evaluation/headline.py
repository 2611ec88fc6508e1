"""README's first table, made from rows of the attack suite: every column of the same images.

python -m apudae.evaluation.headline    # writes it between the markers of README.md
"""

import json

import pandas as pd

from ..datasets import look_up
from ..files import RESULTS, ROOT, written_aside
from ..purification.config import PRESETS
from .results import read_results
from .tables import with_interval

FILES = ("mnist-adaptive.csv", "cifar10-jpeg.csv")
SHOWN = 0.1
BEGIN, END = "<!-- headline: made from rows by `make readme` -->", "<!-- end of headline -->"
DEFENSE = ["dataset", "classifier", "dae", "purifier", "step_size", "steps"]


def suite_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each defense, on the same images: clean, what the gray box leaves, what the whole suite leaves.

    The gray box is all attacks of the suite on the classifier alone. Of several suites the one on the most images, of
    these the lower. Where the defense is random, the worst case is the mean over the draws that judge. `budget` is the
    suite's, "" where it is older than these.
    """
    lines = []
    rows = rows[rows.kind.isin(["ladder", "worst_case"])].fillna({"step_size": 0, "steps": 0})
    for defense, own in rows.groupby(DEFENSE, sort=False, dropna=False):
        last = own[own.kind == "worst_case"].sort_values(["n", "accuracy"], ascending=[False, True]).iloc[0]
        suite = own[(own.kind == "ladder") & (own.n == last.n) & (own.commit == last.commit)]
        gray = suite[suite.attack.str.startswith("gray_")].sort_values("position").tail(1)
        parts = {"clean": suite[suite.attack == "clean"].tail(1), "gray box": gray, "worst case": last.to_frame().T}
        cells = {name: with_interval(part).iloc[0] if len(part) else "–" for name, part in parts.items()}
        if last.runs > 1 and pd.notna(last.get("mean_low")):
            cells["worst case"] = f"{last['mean']:.3f} [{last.mean_low:.3f}, {last.mean_high:.3f}]"
        lines.append(dict(zip(DEFENSE, defense, strict=True)) | cells)
        lines[-1] |= {"images": int(last.n), "budget": json.loads(last.attack_parameters).get("budget", "")}
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
        place = table.purifier.str.split().str[0].map(["none", *PRESETS].index)
        foreign = (table.classifier != entry.classifier).astype(int) * 2
        foreign += ((table.dae != entry.dae) & (table.purifier != "none")).astype(int)
        table = table.iloc[(100 * foreign + place).argsort(kind="stable")]
        weak = table["gray box"].str[:5].replace("–", "0").astype(float) < SHOWN
        for line in table[~weak | (table.purifier == "none")].to_dict("records"):
            cells = [line["clean"], line["gray box"], f"**{line['worst case']}**", str(line["images"])]
            lines.append("| " + " | ".join([_label(line, entry), *cells]) + " |")
    return "\n".join(lines)


def _label(line: dict, entry: object) -> str:
    words = ["no purifier" if line["purifier"] == "none" else line["purifier"]]
    far = line["step_size"] and abs(line["step_size"] - entry.budget.step_size) > 1e-6
    words += [f"α = {line['step_size']:.2g}"] if far else []
    words += [f"n = {line['steps']:.0f}"] if line["steps"] not in (0, 15) else []
    words += [f"`{line['dae']}`"] if line["purifier"] != "none" and line["dae"] != entry.dae else []
    words += [f"classifier `{line['classifier']}`"] if line["classifier"] != entry.classifier else []
    return ", ".join(words) + " †" * (not line["budget"])


def main() -> None:
    """Write the table into README.md."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    with written_aside(path) as aside:
        aside.write_text(f"{before}{BEGIN}\n\n{headline()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
