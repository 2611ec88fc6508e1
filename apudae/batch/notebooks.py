"""Notebooks through papermill, with parameters that are checked before anything starts."""

import ast
import contextlib
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from jupyter_client import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from traitlets.config import Config

from ..contracts import check_known
from ..files import ROOT, RUNS, data_root, provenance, written_aside
from .html import page

NOTEBOOKS = ROOT / "notebooks"


class NotebookError(RuntimeError):
    """A cell of a notebook failed."""


def notebook_names() -> list[str]:
    """The numbered notebooks, in reading order."""
    return sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def declared_parameters(name: str) -> dict[str, tuple[Any, str]]:
    """Parameters of a notebook: name to (default, comment)."""
    check_known("notebook", name, notebook_names())
    found = papermill.inspect_notebook(str(NOTEBOOKS / f"{name}.ipynb"))
    return {key: (ast.literal_eval(value["default"]), value["help"]) for key, value in found.items()}


def check_parameters(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """`given`, text turned into the types of the notebook's defaults. ValueError for an unknown or ill-typed one."""
    declared = declared_parameters(name)
    checked = {}
    for key, value in given.items():
        check_known(f"parameter of {name}", key, declared)
        default = declared[key][0]
        value = _literal(value) if isinstance(value, str) and not isinstance(default, str) else value
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            needed = f"{type(default).__name__}, as its default {default!r}"
            raise ValueError(f"parameter {key} of {name} is {value!r} ({type(value).__name__}); needed: {needed}")
        checked[key] = value
    return checked


def _literal(text: str) -> Any:
    """The number or switch that `text` writes, or the text itself."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):  # YAML reads 1e-3 as text
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def read_mapping(file: Path) -> dict[str, Any]:
    """The names and values of a YAML file. ValueError if it is missing, broken or holds something else."""
    if not file.is_file():
        raise ValueError(f"{file} is no file; needed: a YAML file, one `name: value` a line")
    try:
        read = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{file} holds {type(read).__name__}; needed: one `name: value` a line")
    return read


def _kernel_manager(environment: dict[str, str]) -> type[AsyncKernelManager]:
    """A manager whose kernels have `environment` beside this process's own."""

    class Manager(AsyncKernelManager):
        async def start_kernel(self, **options: Any) -> None:
            await super().start_kernel(env=os.environ | environment, **options)

    return Manager


def run_notebook(
    name: str, given: dict[str, Any], target: Path | None = None, environment: dict[str, str] | None = None
) -> Path:
    """Execute a notebook into `target` (data/runs/<run>/<name>.ipynb), with an HTML copy beside it; return `target`.

    It is written aside and moved into place when it has succeeded. A cell that fails raises `NotebookError` and leaves
    <name>.failed.ipynb to look at; so does a kernel that dies, without it. `environment`: further variables for it.
    """
    parameters = check_parameters(name, given)
    run = parameters.get("run", declared_parameters(name)["run"][0])
    target = target or RUNS / run / f"{name}.ipynb"
    words = [word for key, value in parameters.items() for word in ("-p", key, str(value))]
    known = {"APUDAE_COMMIT": provenance()["commit"], "APUDAE_DATA": str(data_root())}
    known["APUDAE_COMMAND"] = " ".join(["apudae run", name, *words])
    failed = target.with_suffix(".failed.ipynb")
    with written_aside(target) as aside, tempfile.TemporaryDirectory() as sockets:
        try:
            papermill.execute_notebook(
                str(NOTEBOOKS / f"{name}.ipynb"),
                str(aside),
                parameters=parameters,
                cwd=str(NOTEBOOKS),
                kernel_name="python3",
                stderr_file=sys.stderr,
                kernel_manager_class=_kernel_manager(known | (environment or {})),
                config=Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"}),  # no open port
            )
        except papermill.PapermillExecutionError as error:
            os.replace(aside, failed)
            raise NotebookError(
                f"{name}, cell {error.exec_count}: {error.ename}: {error.evalue}\n  see {failed}"
            ) from error
        except DeadKernelError as error:
            raise NotebookError(f"{name}: its kernel died (killed, or out of memory)") from error
        without_progress(aside)
    failed.unlink(missing_ok=True)
    with written_aside(target.with_suffix(".html")) as aside:
        aside.write_text(page(nbformat.read(target, as_version=4)))
    return target


def without_progress(path: Path) -> None:
    """Drop the traces of progress bars (text that moves the cursor) from an executed notebook."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not re.search(r"\r|\x1b\[A", output.get("text", ""))]
    nbformat.write(notebook, path)


def question(notebook: nbformat.NotebookNode) -> str:
    """The question that a notebook's first cell asks."""
    lines = notebook.cells[0].source.splitlines()
    return next((line for line in lines if line.startswith("**Question.**")), "").removeprefix("**Question.** ")


def tagged_text(path: Path, tag: str) -> str:
    """Plain text of the outputs of an executed notebook's cells that carry `tag`."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if tag in cell.metadata.get("tags", [])]
    outputs = [output for cell in cells for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
