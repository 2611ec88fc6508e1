"""Where things lie, how they are written (aside, then moved into place), and where a result came from."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = ROOT / "data" / "checkpoints"
DOWNLOADS = ROOT / "data" / "downloads"
RESULTS = ROOT / "data" / "results"
RUNS = ROOT / "data" / "runs"


def data_root() -> Path:
    """The folder of data sets: the environment variable APUDAE_DATA (relative to the repository), else data/downloads."""
    return (ROOT / os.environ.get("APUDAE_DATA", DOWNLOADS)).resolve()


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place on success, remove it on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (through a file in the system's lock semantics; released when a process dies)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def provenance() -> dict[str, str]:
    """The commit of this checkout (`-dirty` with uncommitted changes) and the command that is running.

    `apudae run` hands both to the notebook's kernel, as they were when it started.
    """
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty"]
    commit = os.environ.get("APUDAE_COMMIT") or subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    command = os.environ.get("APUDAE_COMMAND") or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"commit": commit or "unknown", "command": command}
