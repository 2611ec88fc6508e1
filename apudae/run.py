"""The command line `apudae`: notebooks through papermill, with parameters that are checked before anything starts."""

import ast
import contextlib
import json
import os
import re
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import click
import nbformat
import papermill
import plotly.io as pio
import yaml
from nbconvert import HTMLExporter
from traitlets.config import Config

from .contracts import check_known
from .files import ROOT, RUNS, data_root, provenance, written_aside

NOTEBOOKS = ROOT / "notebooks"
PLOTLY = "application/vnd.plotly.v1+json"


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


def run_notebook(name: str, given: dict[str, Any]) -> Path:
    """Execute a notebook into data/runs/<run>/, with an HTML copy beside it; return the path of the executed notebook.

    It is written aside and moved into place when it has succeeded. A cell that fails raises `NotebookError` and leaves
    <name>.failed.ipynb to look at.
    """
    parameters = check_parameters(name, given)
    run = parameters.get("run", declared_parameters(name)["run"][0])
    target = RUNS / run / f"{name}.ipynb"
    words = [word for key, value in parameters.items() for word in ("-p", key, str(value))]
    os.environ["APUDAE_COMMIT"] = provenance()["commit"]
    os.environ["APUDAE_COMMAND"] = " ".join(["apudae run", name, *words])
    os.environ["APUDAE_DATA"] = str(data_root())
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
                config=Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"}),  # no open port
            )
        except papermill.PapermillExecutionError as error:
            os.replace(aside, failed)
            raise NotebookError(
                f"{name}, cell {error.exec_count}: {error.ename}: {error.evalue}\n  see {failed}"
            ) from error
        without_progress(aside)
    failed.unlink(missing_ok=True)
    with written_aside(target.with_suffix(".html")) as aside:
        aside.write_text(_html(target))
    return target


def without_progress(path: Path) -> None:
    """Drop the traces of progress bars (text that moves the cursor) from an executed notebook."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not re.search(r"\r|\x1b\[A", output.get("text", ""))]
    nbformat.write(notebook, path)


def _html(path: Path) -> str:
    """The notebook as one HTML page whose figures stay interactive without a network."""
    notebook, library = nbformat.read(path, as_version=4), True
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if PLOTLY in output.get("data", {}):
                drawn = pio.from_json(json.dumps(output.data[PLOTLY]), skip_invalid=True)
                output.data = {"text/html": pio.to_html(drawn, include_plotlyjs=library, full_html=False)}
                library = False
    return HTMLExporter().from_notebook_node(notebook)[0]


def tagged_text(path: Path, tag: str) -> str:
    """Plain text of the outputs of an executed notebook's cells that carry `tag`."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if tag in cell.metadata.get("tags", [])]
    outputs = [output for cell in cells for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Adversarial purification with denoising autoencoders: run and list the notebooks."""


@cli.command()
@click.argument("notebook")
@click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="Set one parameter.")
@click.option("-f", "file", type=click.Path(dir_okay=False, path_type=Path), help="Set parameters from a YAML file.")
def run(notebook: str, pairs: tuple[tuple[str, str], ...], file: Path | None) -> None:
    """Execute NOTEBOOK (its name, such as 00_quickstart) into data/runs/."""
    given = _read_parameters(file) if file else {}
    target = run_notebook(Path(notebook).stem, given | dict(pairs))
    if table := tagged_text(target, "result"):
        click.echo(f"\n{table}\n")
    click.echo(f"executed notebook  {os.path.relpath(target)}")
    click.echo(f"open in a browser  {os.path.relpath(target.with_suffix('.html'))}")


def _read_parameters(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is no file; needed: a YAML file of parameters, one `name: value` a line")
    try:
        read = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{file} holds {type(read).__name__}; needed: parameters, one `name: value` a line")
    return read


@cli.command()
def notebooks() -> None:
    """List the notebooks with their question and parameters."""
    for name in notebook_names():
        first = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells[0].source
        question = next((line for line in first.splitlines() if line.startswith("**Question.**")), "")
        click.secho(name, bold=True)
        click.echo(
            textwrap.fill(question.removeprefix("**Question.** "), 100, initial_indent="  ", subsequent_indent="  ")
        )
        for key, (default, comment) in declared_parameters(name).items():
            click.echo(f"    {key} = {default!r}  {comment}")


def main() -> None:
    """Entry point: bad input is one line and exit status 2, a failed notebook one message and exit status 1."""
    try:
        cli()
    except ValueError as error:
        click.echo(f"apudae: {error}", err=True)
        sys.exit(2)
    except NotebookError as error:
        click.echo(f"apudae: {error}", err=True)
        sys.exit(1)
