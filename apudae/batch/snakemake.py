"""Snakemake started, watched and cleaned up after: it runs the steps of a sweep."""

import fcntl
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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch

from ..contracts import check_known
from ..files import RESULTS as COMMITTED
from ..files import RUNS, here, written_aside
from ..processes import die_with_parent
from . import RESULTS, NotebookError
from .parameters import read_mapping, with_defaults
from .sweep import WORKFLOW, read_sweep

PROFILES = WORKFLOW / "profiles"
# how Snakemake reports on a step
EVENT = re.compile(
    r"(?:local)?rule (?P<started>\w+):|Finished jobid: \d+ \(Rule: (?P<finished>\w+)\)|Error in rule (?P<failed>\w+)"
)
EXECUTORS = {"slurm": "sbatch"}  # the program without which an engine cannot work


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


def gpu_places(sweep: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """On this machine: its GPUs, each as often as notebooks may share it; on a cluster none: that hands them out."""
    if settings["executor"] != "local" or not any(step["gpu"] for step in sweep["steps"].values()):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    gpus = visible.split(",") if torch.cuda.is_available() else []
    if not gpus:
        names = ", ".join(name for name, step in sweep["steps"].items() if step["gpu"])
        raise ValueError(f"these steps need a GPU, and there is none here: {names}")
    for name, step in sweep["steps"].items():
        if step["gpu"] > len(gpus):
            raise ValueError(f"step {name} needs {step['gpu']} GPUs; there are {len(gpus)} here")
    share = int(settings["config"].get("notebooks_per_gpu", 1))
    return [f"{gpu}.{place}" for place in range(share) for gpu in gpus]


def run_sweep(path: Path, profile: str = "local", dry_run: bool = False, given: dict[str, Any] | None = None) -> None:
    """Run the steps of a sweep file that are not done. NotebookError, naming each, if some failed.

    `given`: parameters in place of the file's general ones.
    After any death of an earlier launcher, calling this again goes on where it was.
    """
    settings = read_profile(profile)
    sweep = read_sweep(path, settings["config"].get("device", ""), given)
    sweep["gpu_places"] = gpu_places(sweep, settings)
    folder = RUNS / path.stem
    with _alone(folder):
        with written_aside(folder / "steps.json") as aside:
            aside.write_text(json.dumps(sweep, indent=1), encoding="utf-8")
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(WORKFLOW / "Snakefile")]
        command += ["--profile", str(PROFILES / profile)]
        command += ["--directory", str(folder), "--configfile", str(folder / "steps.json")]
        command += ["--nolock", "--rerun-incomplete", "--keep-going"]  # `_alone` is the lock: it never outlives us
        if sweep["gpu_places"]:
            command += ["--resources", f"gpu={len(sweep['gpu_places'])}"]
        todo = _steps_to_do(command, sweep)
        steps = f"{len(sweep['order'])} steps, {len(sweep['order']) - len(todo)} done, {len(todo)} to do"
        click.echo(f"{path}: {steps}, in {os.path.relpath(folder)}")
        workers = settings.get("jobs", settings.get("cores"))
        _estimate(sweep, todo, folder, os.cpu_count() if workers == "all" else int(workers))
        if dry_run:
            click.echo("\n".join(todo))
        elif todo:
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


def _estimate(sweep: dict[str, Any], todo: list[str], folder: Path, workers: int) -> None:
    """Say about how long `todo` takes by earlier benchmarks: all of it on the workers, the longest chain at least.

    A step that never ran here takes what committed rows of its notebook took an image.
    """
    seconds, chain, known, by_rows = {}, {}, _seconds_of_rows() if todo else {}, 0
    for name in todo:
        benchmark, step = folder / f"{name}.benchmark.tsv", sweep["steps"].get(name)
        if benchmark.is_file():
            seconds[name] = float(pd.read_csv(benchmark, sep="\t").s.mean())
        elif step:
            own = with_defaults(step["notebook"], step["parameters"])
            each = known.get((step["notebook"], own.get("dataset"), step["gpu"] > 0))
            if each is not None:
                seconds[name], by_rows = each * own["n"], by_rows + 1
        after = sweep["merged"] if name == RESULTS else sweep["steps"][name]["after"]
        chain[name] = seconds.get(name, 0) + max((chain.get(earlier, 0) for earlier in after), default=0)
    if seconds:
        minutes = max(sum(seconds.values()) / workers, *chain.values()) / 60
        parts = {"earlier benchmarks": len(seconds) - by_rows, "committed rows": by_rows}
        told = " and ".join(f"by {kind} of {count} of them" for kind, count in parts.items() if count)
        click.echo(f"about {minutes:.1f} minutes, {told}")
    elif todo:
        click.echo("no estimate of the time: none of them has run here before")


def _seconds_of_rows() -> dict[tuple[str, str, bool], float]:
    """Seconds an image of a notebook, on a data set, on a GPU or not: the median of its runs whose rows are committed.

    Of what these rows time: attacks and purifiers, not trainings and the start.
    """
    tables = [pd.read_csv(path, keep_default_na=False) for path in COMMITTED.glob("*.csv")]
    tables = [table for table in tables if {"notebook", "kind", "seconds"} <= set(table)]
    if not tables:
        return {}
    rows = pd.concat(tables).query("metric == 'top-1' and kind != 'worst_case' and seconds > 0")
    rows = rows.assign(gpu=~rows.device.str.startswith("cpu"))
    runs = rows.groupby(["notebook", "dataset", "gpu", "command"]).agg({"seconds": "sum", "n": "max"})
    return (runs.seconds / runs.n).groupby(["notebook", "dataset", "gpu"]).median().to_dict()


def _run(command: list[str], todo: list[str], folder: Path) -> None:
    """Start Snakemake, show its progress, and say at the end what failed and why."""
    start, launcher, states = time.monotonic(), os.getpid(), {}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    streams["env"] = os.environ | {"APUDAE_HERE": str(here())}  # steps stand in the folder of the sweep
    alone = {"start_new_session": True, "preexec_fn": lambda: die_with_parent(launcher)}  # Ctrl-C comes to us only
    engine = subprocess.Popen(command, **streams, **alone)
    try:
        for line in engine.stdout:
            found = EVENT.match(line)
            if found and (name := found[found.lastindex]) in todo:
                states[name] = found.lastgroup
                done = list(states.values()).count("finished")
                click.echo(
                    f"{(time.monotonic() - start) / 60:6.1f} min  {done} of {len(todo)}  {found.lastgroup} {name}"
                )
        engine.wait()
    except KeyboardInterrupt:
        os.killpg(engine.pid, signal.SIGINT)  # the engine and its steps, which end their kernels
        with suppress(subprocess.TimeoutExpired):
            engine.wait(20)
        raise NotebookError("stopped; the same command goes on from here") from None
    finally:
        if engine.poll() is None:
            os.killpg(engine.pid, signal.SIGKILL)
    if engine.returncode:
        raise NotebookError(_what_failed(states, todo, folder))


def _what_failed(states: dict[str, str], todo: list[str], folder: Path) -> str:
    failed = [name for name in todo if states.get(name) == "failed"]
    lines = [f"{len(failed)} of {len(todo)} steps failed; the same command tries them again"]
    for name in failed:
        log = folder / f"{name}.log"
        _, mark, error = (log.read_text(encoding="utf-8") if log.is_file() else "").rpartition("apudae: ")
        lines.append(f"- {name}: {error.strip() if mark else 'killed, or never started'}")
    if waiting := [name for name in todo if name not in states]:
        lines.append(f"not run, as they come after: {', '.join(waiting)}")
    return "\n".join([*lines, f"logs: {os.path.relpath(folder)}/<step>.log, Snakemake's in .snakemake/log/ there"])
