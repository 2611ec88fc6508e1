"""A study as a graph of notebooks: a sweep file is checked and resolved into steps."""

import hashlib
import os
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import jsonschema
import nbformat
import yaml

from ..checkpoints import load_model
from ..contracts import check_known
from ..datasets import SPLITS, look_up
from ..datasets.folder import path_and_size
from ..files import CHECKPOINTS, ROOT, RUNS, from_root, run_folder
from ..names import FOLDER
from ..purification.config import PRESETS
from . import RESULTS
from .parameters import NOTEBOOKS, check_parameters, declared_parameters, from_here, read_mapping, with_defaults

WORKFLOW = ROOT / "workflow"


def read_sweep(path: Path, device: str = "", given: dict[str, Any] | None = None) -> dict[str, Any]:
    """The steps of a sweep file, checked and resolved, in an order in which they can run, and whose rows are merged.

    `device` is that of every step which does not say its own; `given` goes before the file's general parameters.
    ValueError, one sentence, for anything that cannot work.
    """
    run_folder(path.stem)
    written = read_mapping(path)
    schema = yaml.safe_load((WORKFLOW / "config" / "schema.yaml").read_text(encoding="utf-8"))
    if error := jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(written)):
        raise ValueError(f"{path}, at {error.json_path.removeprefix('$.')}: {' '.join(error.message.split())}")
    asked = written.get("parameters", {}) | (given or {})
    general = ({"device": device} if device else {}) | asked
    outputs = [step.get("parameters", {}).get("output", "") for step in written["steps"].values()]
    steps, trained = {}, {(ROOT / str(output)).resolve() for output in outputs}
    for name, step in written["steps"].items():
        try:
            steps[name] = _resolved(name, step, general, path.stem, trained)
        except ValueError as error:
            raise ValueError(f"{path}, step {name}: {error}") from error
    for key in asked:
        if not any(key in step["parameters"] for step in steps.values()):
            raise ValueError(f"{path}: no notebook of its steps has the parameter {key!r}")
    for target, names in _targets(steps).items():
        if len(names) > 1:
            raise ValueError(
                f"{path}: the steps {' and '.join(names)} write the same {target}; give them other outputs or runs"
            )
    for name, step in steps.items():
        for earlier in step["after"]:
            check_known(f"{path}, step {name}: step", earlier, [*steps, RESULTS])
    return {"steps": steps, **_ordered(path, steps)}


def _targets(steps: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Where each network that is trained is written, and by which steps."""
    found: dict[str, list[str]] = {}
    for name, step in steps.items():
        given = with_defaults(step["notebook"], step["parameters"])
        if "output" in given:
            target = given["output"] or f"data/runs/{given['run']}/{given.get('architecture', step['notebook'])}"
            found.setdefault(from_root((ROOT / target).resolve()), []).append(name)
    return found


def _ordered(path: Path, steps: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """An order in which the steps can run, `results` among them, and the steps whose rows that merges."""
    late = {RESULTS}
    while more := {name for name in steps if name not in late and late.intersection(steps[name]["after"])}:
        late |= more
    merged = [name for name in steps if steps[name]["writes_rows"] and name not in late]
    if late != {RESULTS} and not merged:
        raise ValueError(f"{path}: no step before {RESULTS} writes rows")
    graph = {name: step["after"] for name, step in steps.items()} | ({RESULTS: merged} if merged else {})
    try:
        return {"merged": merged, "order": list(TopologicalSorter(graph).static_order())}
    except CycleError as error:
        raise ValueError(f"{path}: the steps form a cycle: {' → '.join(reversed(error.args[1]))}") from error


def _resolved(
    name: str, step: dict[str, Any], general: dict[str, Any], sweep: str, trained: set[Path]
) -> dict[str, Any]:
    """One step with all its parameters, their values checked; `trained`: networks that the sweep makes itself."""
    notebook, own = step["notebook"], step.get("parameters", {})
    declared = declared_parameters(notebook)
    given = {key: value for key, value in general.items() if key in declared} | own
    parameters = from_here(check_parameters(notebook, given))
    parameters["run"] = str(Path(sweep, parameters.get("run", "")))
    writes_rows = "results" in declared and "results" not in parameters
    if writes_rows:
        parameters["results"] = os.path.relpath(RUNS / sweep / f"{name}.csv", ROOT)
    effective = with_defaults(notebook, parameters)
    _check_values(effective, trained)
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    code = "\0".join(cell.source for cell in cells if cell.cell_type == "code")
    return {
        "notebook": notebook,
        "after": step.get("after", []),
        "parameters": parameters,
        "writes_rows": writes_rows,
        "gpu": effective.get("processes", 1) if effective.get("device") == "cuda" else 0,  # how many
        "code": hashlib.sha256(code.encode()).hexdigest(),  # prose and outputs may change, and nothing runs again
    }


def _check_values(parameters: dict[str, Any], trained: set[Path]) -> None:
    """Refuse what the notebook itself would refuse only when its turn has come."""
    for key, names in {"split": SPLITS, "purifier": PRESETS}.items():
        if key in parameters:
            check_known(key, parameters[key], names)
    for key in {"classifier", "dae"} & parameters.keys():
        if parameters[key] and not trained & {(folder / parameters[key]).resolve() for folder in (CHECKPOINTS, ROOT)}:
            load_model(parameters[key])
    if dataset := parameters.get("dataset"):
        look_up(dataset)
        folder, _ = path_and_size(dataset.removeprefix(FOLDER))
        if dataset.startswith(FOLDER) and not os.path.isdir(folder):
            raise ValueError(f"{folder} is no folder; needed: images, a folder for each class")
