"""One notebook executed through papermill, aside and then moved into place, with an HTML page beside it."""

import json
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient.exceptions import DeadKernelError
from traitlets.config import Config

from ..files import data_root, here, provenance, run_folder, written_aside
from . import NotebookError
from .html import page
from .parameters import NOTEBOOKS, check_parameters, with_defaults

WIDGET = "application/vnd.jupyter.widget-view+json"
BAR = re.compile(r"\d+%\|.*\|")  # the last state of one, which it leaves behind


def _kernel_manager(environment: dict[str, str]) -> type[AsyncKernelManager]:
    """A manager whose kernels are this interpreter, whatever JUPYTER_PATH offers, with `environment` beside its own."""

    class Manager(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            super().__init__(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **options)

        async def start_kernel(self, **options: Any) -> None:
            await super().start_kernel(env=os.environ | environment, **options)

    return Manager


def _short_folder() -> tempfile.TemporaryDirectory:
    """A folder for the kernel's sockets, whose paths may have 107 bytes, whatever TMPDIR is."""
    long = len(tempfile.gettempdir()) > 60 and Path("/tmp").is_dir()
    return tempfile.TemporaryDirectory(dir="/tmp" if long else None)


def run_notebook(
    name: str, given: dict[str, Any], target: Path | None = None, environment: dict[str, str] | None = None
) -> Path:
    """Execute a notebook into `target` (data/runs/<run>/<name>.ipynb), with an HTML copy beside it; return `target`.

    It is written aside and moved into place when it has succeeded. A cell that fails raises `NotebookError` and leaves
    <name>.failed.ipynb to look at; so does a kernel that dies, without it. `environment`: further variables for it.
    """
    parameters = check_parameters(name, given)
    target = target or run_folder(with_defaults(name, parameters)["run"]) / f"{name}.ipynb"
    if parameters.get("device") == "cuda":
        from ..contracts import check_device  # here, as torch takes seconds, for which a CPU's notebook need not wait

        check_device("cuda")
    known = {"APUDAE_COMMIT": provenance()["commit"], "APUDAE_DATA": str(data_root()), "APUDAE_HERE": str(here())}
    known["APUDAE_COMMAND"] = _command(name, parameters)
    failed = target.with_suffix(".failed.ipynb")
    with written_aside(target) as aside, _short_folder() as sockets:
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
                f"{name}, cell {error.exec_count}: {error.ename}: {error.evalue}; see {failed}"
            ) from error
        except DeadKernelError as error:
            raise NotebookError(f"{name}: its kernel died (killed, or out of memory)") from error
        without_progress(aside)
    failed.unlink(missing_ok=True)
    with written_aside(target.with_suffix(".html")) as aside:
        aside.write_text(page(nbformat.read(target, as_version=4)), encoding="utf-8")
    return target


def _command(name: str, parameters: dict[str, Any]) -> str:
    """The shell's words that do this again; a module of one's own is found from where the user stands."""
    texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in parameters.items()}
    command = shlex.join(["apudae", "run", name, *(word for pair in texts.items() for word in ("-p", *pair))])
    own = any("python:" in text for text in texts.values())
    return f"{shlex.join(['cd', str(here())])} && {command}" if own else command


def without_progress(path: Path) -> None:
    """Drop the traces of progress bars from an executed notebook, and widgets, which are dead without their kernel.

    What else its cells said stays, and the text that stands for a widget.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in [*cell.get("outputs", [])]:
            data = output.get("data", {})
            data.pop(WIDGET, None)
            if output.output_type == "stream":
                lines = [line.rpartition("\r")[2] for line in output.text.replace("\x1b[A", "").split("\n")]
                output.text = "\n".join(line for line in lines if not BAR.search(line))
            silent = output.output_type == "stream" and not output.text.strip()
            if silent or BAR.search(data.get("text/plain", "")):
                cell.outputs.remove(output)
    nbformat.write(notebook, path)


def tagged_text(path: Path, tag: str) -> str:
    """Plain text of the outputs of an executed notebook's cells that carry `tag`."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if tag in cell.metadata.get("tags", [])]
    outputs = [output for cell in cells for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
