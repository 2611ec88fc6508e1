"""A study as a graph of notebooks: a sweep file is checked and resolved into steps, and Snakemake runs them.

Everything a sweep writes lies in data/runs/<name of its file>/: for each step the executed notebook, its page, rows
(CSV), log and benchmark; `results.csv` merges the rows of all steps, and `tables.csv` leaves out what differs from run
to run. `python -m apudae.sweep STEP PARENT`, in that folder, is what Snakemake calls for one step.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import click
import jsonschema
import nbformat
import pandas as pd
import yaml

from .contracts import check_known
from .files import CHECKPOINTS, ROOT, RUNS, written_aside
from .run import NOTEBOOKS, NotebookError, check_parameters, declared_parameters, read_mapping, run_notebook

WORKFLOW = ROOT / "workflow"
PROFILES = WORKFLOW / "profiles"
RESULTS = "results"  # the step that merges the rows
VOLATILE = ["device", "seconds", "commit", "command"]  # columns that may differ between two runs of one sweep
EXECUTORS = {"slurm": "sbatch"}  # the program without which an engine cannot work


# --- the sweep file ---------------------------------------------------------------------------------------------------


def read_sweep(path: Path, device: str = "") -> dict[str, Any]:
    """The steps of a sweep file, checked and resolved, in an order in which they can run, and whose rows are merged.

    `device` is that of every step which does not say its own. ValueError, one sentence, for anything that cannot work.
    """
    written = read_mapping(path)
    schema = yaml.safe_load((WORKFLOW / "config" / "schema.yaml").read_text())
    if error := jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(written)):
        raise ValueError(f"{path}, at {error.json_path.removeprefix('$.')}: {' '.join(error.message.split())}")
    general = ({"device": device} if device else {}) | written.get("parameters", {})
    steps = {}
    for name, step in written["steps"].items():
        try:
            steps[name] = _resolved(name, step, general, path.stem)
        except ValueError as error:
            raise ValueError(f"{path}, step {name}: {error}") from error
    known = {key for step in steps.values() for key in declared_parameters(step["notebook"])}
    for key in written.get("parameters", {}):
        check_known(f"{path}: parameter", key, sorted(known))
    for name, step in steps.items():
        for earlier in step["after"]:
            check_known(f"{path}, step {name}: step", earlier, [*steps, RESULTS])
    late = {RESULTS}
    while more := {name for name in steps if name not in late and late.intersection(steps[name]["after"])}:
        late |= more
    merged = [name for name in steps if steps[name]["writes_rows"] and name not in late]
    if late != {RESULTS} and not merged:
        raise ValueError(f"{path}: no step before {RESULTS} writes rows")
    graph = {name: step["after"] for name, step in steps.items()} | ({RESULTS: merged} if merged else {})
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise ValueError(f"{path}: the steps form a cycle: {' → '.join(reversed(error.args[1]))}") from error
    _check_checkpoints(path, steps)
    return {"steps": steps, "merged": merged, "order": order}


def _resolved(name: str, step: dict[str, Any], general: dict[str, Any], sweep: str) -> dict[str, Any]:
    """One step with all its parameters."""
    notebook, own = step["notebook"], step.get("parameters", {})
    declared = declared_parameters(notebook)
    parameters = check_parameters(notebook, {key: value for key, value in general.items() if key in declared} | own)
    parameters["run"] = str(Path(sweep, parameters.get("run", "")))
    writes_rows = "results" in declared and "results" not in parameters
    if writes_rows:
        parameters["results"] = os.path.relpath(RUNS / sweep / f"{name}.csv", ROOT)
    effective = {key: default for key, (default, _) in declared.items()} | parameters
    _check_values(effective)
    return {
        "notebook": notebook,
        "after": step.get("after", []),
        "parameters": parameters,
        "writes_rows": writes_rows,
        "gpu": str(effective.get("device", "")).startswith("cuda"),
        "code": _code_digest(notebook),
    }


def _check_values(parameters: dict[str, Any]) -> None:
    """The names that would otherwise be found unknown only when the notebook runs."""
    from .data import NAMES, SPLITS
    from .purify import PRESETS

    known = {"split": SPLITS, "purifier": PRESETS, "device": ("cpu", "cuda")}
    for key, names in known.items():
        if key in parameters:
            check_known(key, parameters[key], names)
    if dataset := parameters.get("dataset"):
        folder = dataset.removeprefix("folder:")
        check_known("data set", dataset if folder == dataset else "folder:PATH", NAMES)
        if folder != dataset and not Path(folder).expanduser().is_dir():
            raise ValueError(f"{folder} is no folder; needed: images, a folder for each class")


def _check_checkpoints(path: Path, steps: dict[str, dict[str, Any]]) -> None:
    """Every network that a step reads can be loaded, or is what another step trains."""
    from .checkpoints import load_model

    trained = {
        (ROOT / step["parameters"]["output"]).resolve() for step in steps.values() if "output" in step["parameters"]
    }
    for name, step in steps.items():
        defaults = {key: default for key, (default, _) in declared_parameters(step["notebook"]).items()}
        for key in {"classifier", "dae"} & defaults.keys():
            checkpoint = step["parameters"].get(key, defaults[key])
            if (CHECKPOINTS / checkpoint).resolve() not in trained:
                try:
                    load_model(checkpoint)
                except ValueError as error:
                    raise ValueError(f"{path}, step {name}: {error}") from error


def _code_digest(notebook: str) -> str:
    """Changes with the code of a notebook, not with its prose or outputs."""
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    return hashlib.sha256("\0".join(cell.source for cell in cells if cell.cell_type == "code").encode()).hexdigest()[
        :16
    ]


# --- the profile ------------------------------------------------------------------------------------------------------


def read_profile(name: str) -> dict[str, Any]:
    """A profile's settings for Snakemake, those below `config` as a dict. ValueError if its engine is not there."""
    check_known("profile", name, sorted(path.name for path in PROFILES.iterdir()))
    settings = read_mapping(PROFILES / name / "config.yaml")
    engine = settings.setdefault("executor", "local")
    plugin, program = f"snakemake_executor_plugin_{engine}", EXECUTORS.get(engine)
    if engine != "local" and importlib.util.find_spec(plugin) is None:
        advice = f"pip install {plugin.replace('_', '-')}"
        raise ValueError(f"the profile {name} needs Snakemake's engine for {engine}, which is not installed; {advice}")
    if program and not shutil.which(program):
        raise ValueError(f"the profile {name} needs {engine}, which is not installed here: there is no {program}")
    settings["config"] = dict(entry.split("=", 1) for entry in settings.get("config", []))
    return settings


def _gpu_places(sweep: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """On this machine: its GPUs, each as often as notebooks may share it. Elsewhere none: the cluster hands them out."""
    if settings["executor"] != "local" or not any(step["gpu"] for step in sweep["steps"].values()):
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    gpus = visible.split(",") if torch.cuda.is_available() else []
    if not gpus:
        names = ", ".join(name for name, step in sweep["steps"].items() if step["gpu"])
        raise ValueError(f"these steps need a GPU, and there is none here: {names}")
    share = int(settings["config"].get("notebooks_per_gpu", 1))
    return [f"{gpu}.{place}" for place in range(share) for gpu in gpus]


# --- one step, in its own process -------------------------------------------------------------------------------------


def die_with_parent(parent: int) -> None:
    """Have Linux kill this process when `parent`, which started it, dies, even by kill -9: no orphan goes on working."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


@contextmanager
def gpu_place(places: list[str]) -> Iterator[str]:
    """Hold one of `places` ("<GPU>.<number>") and name its GPU. A place is a lock, freed when its holder dies."""
    with ExitStack() as stack:
        while True:
            for place in places:
                lock = open(RUNS / f".gpu.{os.uname().nodename}.{place}.lock", "w")  # noqa: SIM115
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    lock.close()
                    continue
                stack.enter_context(lock)
                yield place.rpartition(".")[0]
                return
            time.sleep(1)


def run_step(name: str) -> None:
    """Run the step `name` of the sweep in the current folder."""
    sweep = json.loads(Path("steps.json").read_text())
    if name == RESULTS:
        return merge_rows([Path(f"{step}.csv") for step in sweep["merged"]])
    step = sweep["steps"][name]
    Path(f"{name}.csv").unlink(missing_ok=True)  # rows of other parameters would stay
    with ExitStack() as stack:
        if step["gpu"] and sweep["gpu_places"]:
            os.environ["CUDA_VISIBLE_DEVICES"] = stack.enter_context(gpu_place(sweep["gpu_places"]))
        run_notebook(step["notebook"], step["parameters"], Path.cwd() / f"{name}.ipynb")


def merge_rows(paths: list[Path]) -> None:
    """Merge the rows of `paths` into results.csv, sorted, and write the columns that every run agrees in to tables.csv."""
    from .evaluate import IDENTITY, read_results

    rows = pd.concat([read_results(path) for path in paths]).sort_values(IDENTITY, kind="stable")
    rows = rows.drop_duplicates(IDENTITY)  # several notebooks show the undefended classifier
    for name, table in {"results.csv": rows, "tables.csv": rows.drop(columns=VOLATILE).drop_duplicates()}.items():
        with written_aside(Path(name)) as aside:
            table.to_csv(aside, index=False)


# --- the launcher -----------------------------------------------------------------------------------------------------


def run_sweep(path: Path, profile: str = "local", dry_run: bool = False) -> None:
    """Run the steps of a sweep file that are not done. NotebookError, naming each, if some failed.

    After any death of an earlier launcher, calling this again goes on where it was.
    """
    settings = read_profile(profile)
    sweep = read_sweep(path, settings["config"].get("device", ""))
    sweep["gpu_places"] = _gpu_places(sweep, settings)
    folder = RUNS / path.stem
    with _alone(folder):
        with written_aside(folder / "steps.json") as aside:
            aside.write_text(json.dumps(sweep, indent=1))
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(WORKFLOW / "Snakefile")]
        command += [
            "--profile",
            str(PROFILES / profile),
            "--directory",
            str(folder),
            "--configfile",
            str(folder / "steps.json"),
        ]
        command += ["--nolock", "--rerun-incomplete", "--keep-going"]  # `_alone` is the lock: it never outlives us
        if sweep["gpu_places"]:
            command += ["--resources", f"gpu={len(sweep['gpu_places'])}"]
        todo = _steps_to_do(command, sweep)
        _announce(path, sweep, todo, folder, settings, dry_run)
        if todo and not dry_run:
            _run(command, todo, folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the sweep's folder; the system lets go of it when this process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".sweep.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"a sweep is running in {folder}; wait for it, or stop it") from error
        yield


def _steps_to_do(command: list[str], sweep: dict[str, Any]) -> list[str]:
    """The steps that Snakemake would run, in their order."""
    planned = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    if planned.returncode:
        raise NotebookError(f"Snakemake cannot plan the sweep:\n{planned.stderr}{planned.stdout}")
    found = set(re.findall(r"^(?:local)?rule (\w+):", planned.stdout + planned.stderr, re.MULTILINE))
    return [name for name in sweep["order"] if name in found]


def _announce(
    path: Path, sweep: dict[str, Any], todo: list[str], folder: Path, settings: dict[str, Any], dry_run: bool
) -> None:
    """Say how many steps there are, and about how long they take: not less than the longest chain of them."""
    total = len(sweep["order"])
    click.echo(f"{path}: {total} steps, {total - len(todo)} done, {len(todo)} to do, in {os.path.relpath(folder)}")
    seconds, chain = {}, {}
    for name in todo:
        benchmark = folder / f"{name}.benchmark.tsv"
        if benchmark.is_file():
            seconds[name] = float(pd.read_csv(benchmark, sep="\t").s.mean())
        after = sweep["merged"] if name == RESULTS else sweep["steps"][name]["after"]
        chain[name] = seconds.get(name, 0) + max((chain.get(earlier, 0) for earlier in after), default=0)
        if dry_run:
            click.echo(f"  {name}" + (f"  about {seconds[name]:.0f} s" if name in seconds else ""))
    workers = settings.get("jobs", settings.get("cores", 1))
    workers = len(os.sched_getaffinity(0)) if workers == "all" else int(workers)
    if seconds:
        estimate = max(sum(seconds.values()) / workers, *chain.values())
        click.echo(f"about {estimate / 60:.1f} minutes, by earlier benchmarks of {len(seconds)} of them")
    elif todo:
        click.echo("no estimate of the time: none of them was ever run here")


def _run(command: list[str], todo: list[str], folder: Path) -> None:
    """Start Snakemake, show its progress, and say at the end what failed and why."""
    start, launcher, finished, failed = time.monotonic(), os.getpid(), [], []
    engine = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C comes to us alone
        preexec_fn=lambda: die_with_parent(launcher),
    )
    try:
        with open(folder / "snakemake.log", "w") as log:
            for line in engine.stdout:
                log.write(line)
                if found := re.match(
                    r"(?:local)?rule (\w+):|Finished jobid: \d+ \(Rule: (\w+)\)|Error in rule (\w+)", line
                ):
                    began, ended, broken = found.groups()
                    finished += [ended] if ended in todo else []
                    failed += [broken] if broken in todo and broken not in failed else []
                    said = f"started {began}" if began else f"finished {ended}" if ended else f"failed {broken}"
                    minutes = (time.monotonic() - start) / 60
                    if {began, ended, broken} & set(todo):
                        click.echo(f"{minutes:6.1f} min  {len(finished)} of {len(todo)}  {said}")
        engine.wait()
    except KeyboardInterrupt:
        os.killpg(engine.pid, signal.SIGINT)  # the engine and its steps, which end their kernels
        try:
            engine.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(engine.pid, signal.SIGKILL)
        raise NotebookError("stopped; the same command goes on from here") from None
    if engine.returncode:
        raise NotebookError(_what_failed([name for name in failed if name not in finished], finished, todo, folder))


def _what_failed(failed: list[str], finished: list[str], todo: list[str], folder: Path) -> str:
    lines = [f"{len(failed)} of {len(todo)} steps failed; the same command tries them again"]
    for name in failed:
        log = (folder / f"{name}.log").read_text() if (folder / f"{name}.log").is_file() else ""
        error = log.rpartition("apudae: ")[2].strip() if "apudae: " in log else log.strip().rpartition("\n")[2]
        lines.append(f"- {name}: {error}\n  log {os.path.relpath(folder / f'{name}.log')}")
    if waiting := [name for name in todo if name not in failed and name not in finished]:
        lines.append(f"not run, as they come after: {', '.join(waiting)}")
    return "\n".join([*lines, f"Snakemake's log: {os.path.relpath(folder / 'snakemake.log')}"])


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    try:
        run_step(sys.argv[1])
    except (ValueError, NotebookError, OSError) as error:
        sys.exit(f"apudae: {error}")
