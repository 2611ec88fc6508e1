"""Parameters of notebooks: what a notebook declares, and text or a YAML file turned into values of these types."""

import ast
import io
import json
import math
import os
import re
import tokenize
from pathlib import Path
from typing import Any

import yaml

from ..files import CHECKPOINTS, ROOT, from_root, run_folder
from ..names import FOLDER, check_known

NOTEBOOKS = ROOT / "notebooks"
FRACTION = re.compile(r"\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*/\s*([\d.]+(?:[eE][-+]?\d+)?)\s*")


def notebook_names() -> list[str]:
    """The numbered notebooks, in reading order."""
    return sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.ipynb"))


def sources(path: Path) -> list[tuple[list[str], str]]:
    """The tags and the source of each cell of a notebook file (read as JSON: nbformat takes a second to import)."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(cell["metadata"].get("tags", []), "".join(cell["source"])) for cell in cells]


def question(path: Path) -> str:
    """The question that a notebook's first cell asks."""
    lines = sources(path)[0][1].splitlines()
    return next((line for line in lines if line.startswith("**Question.**")), "").removeprefix("**Question.** ")


def declared_parameters(name: str) -> dict[str, tuple[Any, str]]:
    """Parameters of a notebook: name to (default, comment). ValueError for an unknown notebook, or one without."""
    check_known("notebook", name, notebook_names())
    source = next((source for tags, source in sources(NOTEBOOKS / f"{name}.ipynb") if "parameters" in tags), None)
    if source is None:
        raise ValueError(f"{name} has no cell tagged 'parameters'")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    declared = [statement for statement in ast.parse(source).body if isinstance(statement, ast.AnnAssign)]
    return {each.target.id: (ast.literal_eval(each.value), comments.get(each.lineno, "")) for each in declared}


def with_defaults(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Every parameter of a notebook: `given`, and the default of each that is not."""
    return {key: default for key, (default, _) in declared_parameters(name).items()} | given


def check_parameters(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """`given`, text turned into the notebook's types. ValueError for an unknown, ill-typed or impossible one."""
    declared, checked = declared_parameters(name), {}
    for key, value in given.items():
        check_known(f"parameter of {name}", key, declared)
        default = declared[key][0]
        try:
            checked[key] = _as(type(default), value, default)
            _check_value(key, checked[key])
        except (ValueError, OverflowError, yaml.YAMLError) as error:
            needed = f"{type(default).__name__}, as its default {default!r}"
            reason = f" ({' '.join(str(error).split())})" if str(error) else ""
            raise ValueError(
                f"parameter {key} of {name} is {value!r} ({type(value).__name__}){reason}; needed: {needed}"
            ) from error
    return checked


def _as(kind: type, value: Any, default: Any) -> Any:
    """`value` as a `kind`; text is read by that kind. ValueError if it is none."""
    if kind is float and isinstance(value, str):
        return _number(value)
    if kind is not str and isinstance(value, str):
        value = yaml.load(value, _Loader)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError
    kinds = {type(each) for each in default} if kind is list else set()
    one = next(iter(kinds)) if len(kinds) == 1 else float if kinds == {int, float} else None
    if one in (int, float, str):  # of numbers or of words, as the default
        value = [_as(one, each, "") for each in value]
        for each in value:
            _check_value("", each)
    return value


def _number(text: str) -> float:
    """A number, or a fraction of two. ValueError for NaN too."""
    parts = FRACTION.fullmatch(text)
    value = float(parts[1]) / float(parts[2]) if parts and float(parts[2]) else float(text)
    if math.isnan(value):
        raise ValueError("NaN is no number")
    return value


def _check_value(key: str, value: Any) -> None:
    """Refuse, before anything starts, what no notebook can use."""
    if key == "run":
        run_folder(value)
    if type(value) is int and value < (1 if key == "n" else 0):
        raise ValueError(f"needed: at least {1 if key == 'n' else 0}")
    if type(value) is int and value >= 2**63:
        raise ValueError("needed: below 2⁶³, what 64 bits hold")
    if type(value) is float and not math.isfinite(value):
        raise ValueError("needed: a finite number")
    if key == "device":
        check_known("device", value, ("cpu", "cuda"))


def from_here(given: dict[str, Any]) -> dict[str, Any]:
    """`given`, "folder:…" and checkpoints that count from the working folder named so that they count from anywhere.

    Notebooks stand in a folder of their own. A checkpoint of this repository is named from its root. What is written
    ("run", "output", "results") counts from the repository, wherever one stands.
    """
    return {key: value if key in ("run", "output", "results") else _from_here(value) for key, value in given.items()}


def _from_here(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_here(each) for each in value]
    if not isinstance(value, str):
        return value
    if value.startswith(FOLDER):
        path = value.removeprefix(FOLDER)
        return value if not path or path[0] in "~@" else FOLDER + os.path.abspath(path)
    if os.path.isfile(CHECKPOINTS / f"{value}.json") or not os.path.isfile(f"{value}.json"):
        return value  # shipped, or no checkpoint
    return from_root(Path(value))


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core: 010 is ten, on and 2026-11-28 are text; keys are text and come once; few aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            self.aliases = getattr(self, "aliases", 0) + 1
            if self.aliases > 500:
                raise yaml.YAMLError("more than 500 aliases")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge") or not key.value.isprintable():
                raise yaml.YAMLError(f"the key {key.value!r} is no plain word")
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"the key {min(twice)!r} stands twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _form, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?\d+", "-+0123456789"),
    ("float", r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value.replace(".inf", "inf")))


def read_mapping(file: Path) -> dict[str, Any]:
    """The names and values of a YAML file. ValueError if it is missing, broken or holds something else."""
    if not file.is_file():
        raise ValueError(f"{file} is no file; needed: a YAML file, one `name: value` a line")
    try:
        read = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{file} holds {type(read).__name__}; needed: one `name: value` a line")
    return read
