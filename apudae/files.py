"""Paths, how files are written (aside, then moved into place), locks, and where a result came from."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds, which a command line that only needs paths need not wait for
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = ROOT / "data" / "checkpoints"
DOWNLOADS = ROOT / "data" / "downloads"
RESULTS = ROOT / "data" / "results"
UMASK = os.umask(0o077)
os.umask(UMASK)  # there is no other way to read it
RUNS = ROOT / os.environ.get("APUDAE_RUNS", "data/runs")  # where notebooks write


def here() -> Path:
    """The folder where the user stands: commands hand it on as APUDAE_HERE to what they start elsewhere."""
    return Path(os.environ.get("APUDAE_HERE") or Path.cwd())


def from_root(path: Path) -> str:
    """How `path` is called: from the repository's root where it is below that, which names it on every machine."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def data_root() -> Path:
    """The folder of data sets: the environment variable APUDAE_DATA (relative to the repository) or data/downloads."""
    return (ROOT / os.environ.get("APUDAE_DATA", DOWNLOADS)).resolve()


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place on success, remove it on failure.

    What a link points to is replaced, not the link; a file keeps its mode. What a killed writer left goes.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    start, end = f".{path.stem[:100]}.", f".partial{path.suffix}"
    for left in path.parent.glob(f"{escape(start)}*{escape(end)}"):
        _remove_unless_held(left)
    handle, name = tempfile.mkstemp(end, start, path.parent)  # a random name that nobody can have put a link at
    aside = Path(name)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # as long as this process lives
        yield aside
        aside.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~UMASK)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
        os.close(handle)


def _remove_unless_held(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # gone, or nothing of ours
        return
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (a file beside it, which the system releases when a process dies)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # never through a link, and nothing is emptied
    handle = os.open(path.with_name(f".{path.name[:200]}.lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def digest(path: Path, kind: str = "sha256") -> str:
    """The checksum of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def save_tensors(path: Path, tensors: "dict[str, Tensor]", settings: Any) -> None:
    """Write named tensors, with the settings that made them, for a later notebook to read."""
    from safetensors.torch import save_file

    with written_aside(path) as aside:
        tensors = dict(sorted(tensors.items()))
        about = {"settings": json.dumps(settings), "name": path.name}
        save_file(tensors, aside, metadata=about | {"checksum": fingerprint(tensors, sorted(about.items()))})


def load_tensors(path: Path, advice: str) -> "tuple[dict[str, Tensor], Any]":
    """What `save_tensors` wrote. ValueError, ending in `advice`, if it is missing, broken or another file's content."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} is missing; {advice}")
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in sorted(stored.keys())}
            about = dict(stored.metadata())
        settings, checksum = json.loads(about["settings"]), about.pop("checksum")
    except (SafetensorError, KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is broken ({' '.join(str(error).split())}); {advice}") from error
    things = [tensors, sorted(about.items())] if "name" in about else [tensors]  # without: an older file
    if checksum != fingerprint(*things):
        raise ValueError(f"{path} is broken (its checksum differs); {advice}")
    if about.get("name", path.name) != path.name:
        raise ValueError(f"{path} is broken (it holds what {about['name']} should); {advice}")
    return tensors, settings


def fingerprint(*things: Any) -> str:
    """A short name for what decides a result: text, numbers, configurations, tensors, generators and models.

    Of a model: the class of each of its parts, its mode and public attributes, and all weights and buffers.
    """
    found = hashlib.sha256()
    for thing in things:
        _feed(found, thing)
    return found.hexdigest()[:20]


def _feed(found: Any, thing: Any) -> None:
    import torch
    from torch import Tensor, nn

    found.update(f"{type(thing).__module__}.{type(thing).__qualname__}:".encode())
    if isinstance(thing, Tensor):
        found.update(f"{thing.dtype}{tuple(thing.shape)}".encode())
        found.update(thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(thing, nn.Module):
        for name, part in thing.named_modules():
            public = {key: value for key, value in vars(part).items() if not key.startswith("_")}
            _feed(found, (name, f"{type(part).__module__}.{type(part).__qualname__}", public))
        _feed(found, [*thing.named_parameters(), *thing.named_buffers()])
    elif isinstance(thing, torch.Generator):
        _feed(found, thing.get_state())
    elif isinstance(thing, dict):
        _feed(found, [*thing.items()])
    elif isinstance(thing, list | tuple):
        found.update(f"{len(thing)}".encode())
        for each in thing:
            _feed(found, each)
    elif isinstance(thing, type) or (callable(thing) and hasattr(thing, "__qualname__")):
        found.update(f"{thing.__module__}.{thing.__qualname__}".encode())
    elif hasattr(thing, "__dict__") and not isinstance(thing, Path):
        _feed(found, vars(thing))
    else:
        found.update(repr(thing).encode())


def run_folder(run: str) -> Path:
    """The folder data/runs/<run>. ValueError for one outside of data/runs, a hidden one and "report"."""
    folder = (RUNS / run).resolve()
    names = folder.relative_to(RUNS.resolve()).parts if folder.is_relative_to(RUNS.resolve()) else ()
    if not names or names[0] == "report" or any(name.startswith(".") for name in names):
        raise ValueError(f"run is {run!r}; needed: a folder's name below data/runs/, not hidden and not 'report'")
    return folder


def provenance() -> dict[str, str]:
    """The commit of this checkout (`-dirty` with changes outside data/results) and the command that is running.

    `apudae run` hands both to the notebook's kernel, as they were when it started.
    """
    commit = os.environ.get("APUDAE_COMMIT") or _git("rev-parse", "--short=10", "HEAD")
    if commit and "APUDAE_COMMIT" not in os.environ and _git("status", "-suno", "--", ".", ":!data/results"):
        commit += "-dirty"
    command = os.environ.get("APUDAE_COMMAND") or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"commit": commit or "unknown", "command": command}


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git: the commit is unknown
        return ""
