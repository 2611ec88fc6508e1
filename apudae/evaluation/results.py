"""Result rows, and the CSV files of `data/results/` that keep them."""

import csv
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from ..baselines.defense_gan import ProjectionConfig
from ..contracts import check_known
from ..files import locked, provenance, written_aside
from ..purification.config import PurifyConfig
from .accuracy import Accuracy

# one attack by itself; what it and those before it leave; what all leave; what no attacker within ε can take
KINDS = ("attack", "ladder", "worst_case", "certified")
# a new row replaces the row that agrees in all of these
IDENTITY = ["dataset", "split", "n", "metric", "classifier", "dae", "kind", "attack", "attack_parameters", "position"]
IDENTITY += ["purifier", "purifier_parameters", "seed", "device"]
COLUMNS = [*IDENTITY, "epsilon", "steps", "step_size", "correct", "accuracy", "notebook", "command"]
VOLATILE = ["device", "seconds", "commit", "command"]  # columns that may differ between two runs of the same
WHOLE, REAL = ["n", "seed", "correct"], ["accuracy", "ci_low", "ci_high", "seconds"]
MAYBE = ["epsilon", "position", "steps", "step_size"]  # empty where there is none
MAYBE += ["runs", "mean", "mean_low", "mean_high", "std", "voted", "worst_of_runs"]  # as `WorstCase.spread` has them


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
    kind: str = "attack",
    position: float = math.nan,
    notebook: str = "",
) -> dict:
    """One row of results: what was measured on what, how well, how long, where and by which command.

    `epsilon` is the attack's, `steps` and `step_size` are the purifier's n and α; a `position` is the attack's in the
    suite. "others" are the figures by other metrics than top-1, if there are any: `record` makes rows of them.
    """
    check_known("kind", kind, KINDS)
    given = {name: "inf" if value == math.inf else value for name, value in attack_parameters.items()}  # JSON has none
    config = asdict(purifier_config) if purifier_config else {}
    steps = {} if config.get("direct") else config
    row = {
        "dataset": dataset,
        "split": split,
        "n": measured.n,
        "metric": "top-1",
        "classifier": classifier,
        "dae": dae,
        "kind": kind,
        "attack": attack,
        "epsilon": float(attack_parameters.get("epsilon", math.nan)),
        "attack_parameters": json.dumps(given, sort_keys=True),
        "position": position,
        "purifier": purifier,
        "steps": steps.get("steps", math.nan),
        "step_size": steps.get("step_size", math.nan),
        "purifier_parameters": json.dumps(config, sort_keys=True),
        "seed": seed,
        "device": device_name(device),
        **_figures(measured),
        "seconds": round(seconds, 2),
        "notebook": notebook,
        **provenance(),
    }
    return row | {"others": measured.others} if measured.others else row


def _figures(measured: Accuracy) -> dict:
    low, high = (round(end, 5) for end in measured.interval)
    accuracy = round(measured.value, 5)
    return {"n": measured.n, "correct": measured.correct, "accuracy": accuracy, "ci_low": low, "ci_high": high}


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
    new = pd.DataFrame([*others, *rows], dtype=object)  # whole numbers stay whole
    new = new.where(new.notna(), "").astype(str)
    _check_rows(new, "what is to be recorded")
    with locked(path), written_aside(path) as aside:
        before = [_read(path)] if path.is_file() else []
        table = pd.concat([*before, new], ignore_index=True).drop_duplicates(IDENTITY, keep="last")
        table.to_csv(aside, index=False)
    return read_results(path)


def read_results(path: Path) -> pd.DataFrame:
    """The rows of a results file; only its figures are numbers (a commit such as 12345678e9 stays text)."""
    table = _read(path)
    table = table.astype(dict.fromkeys(WHOLE, int) | dict.fromkeys(REAL, float))
    maybe = [name for name in MAYBE if name in table]
    return table.assign(**{name: pd.to_numeric(table[name]) for name in maybe})


def _read(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype=str)
        with open(path, encoding="utf-8", newline="") as file:
            lengths = [len(fields) for fields in csv.reader(file) if fields]
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no file of results ({' '.join(str(error).split())}); move it away") from error
    if missing := [name for name in dict.fromkeys([*COLUMNS, *REAL]) if name not in table]:
        lacks = f"it lacks the columns {', '.join(missing)}"
        raise ValueError(f"{path} is no file of results, or an older one: {lacks}; move it away")
    if cut := [line for line, length in enumerate(lengths, start=1) if length != lengths[0]]:
        raise ValueError(
            f"{path}, line {cut[0]}, is no row of results: {lengths[cut[0] - 1]} of {lengths[0]} columns; mend it"
        )
    _check_rows(table, f"{path}")
    return table


def _check_rows(table: pd.DataFrame, where: str) -> None:
    for line, row in enumerate(table.to_dict("records"), start=2):
        if wrong := _wrong(row):
            raise ValueError(f"{where}, line {line}, is no row of results: {wrong}; mend it, or move the file away")


def _wrong(row: dict[str, str]) -> str:
    """What is wrong with a row of a file, in words; "" if nothing is."""
    try:
        n, _, correct = (int(row[name]) for name in WHOLE)
        accuracy, low, high, _ = (float(row[name]) for name in REAL)
        _ = [float(row[name]) for name in MAYBE if row.get(name)]
        objects = [json.loads(row[name]) for name in ("attack_parameters", "purifier_parameters")]
    except ValueError as error:
        return str(error)
    if not all(isinstance(each, dict) for each in objects):
        return "its parameters are no JSON objects"
    if row["kind"] not in KINDS:
        return f"its kind is {row['kind']!r}"
    if not (0 <= correct <= n and n > 0 and abs(correct / n - accuracy) < 1e-4 and low <= accuracy <= high):
        return f"{correct} of {n} is not {accuracy} in [{low}, {high}]"
    return ""


def merge_results(paths: Iterable[Path], merged: Path, stable: Path) -> None:
    """Write the rows of `paths`, sorted, to `merged`, and of these the columns in which all runs agree to `stable`."""
    rows = pd.concat([_read(path) for path in paths]).sort_values(IDENTITY, kind="stable")
    rows = rows.drop_duplicates(IDENTITY)  # several notebooks show the undefended classifier
    for path, table in {merged: rows, stable: rows.drop(columns=VOLATILE).drop_duplicates()}.items():
        with written_aside(path) as aside:
            table.to_csv(aside, index=False)
