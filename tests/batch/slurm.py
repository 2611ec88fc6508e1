"""A Slurm of one node on this machine, for tests: set up by `cluster`, gone with it. Needs root, slurm-wlm, munge.

python tests/batch/slurm.py: keep it up until Ctrl-C, to try `apudae sweep … --profile slurm` by hand.
"""

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from apudae.processes import die_with_parent

CONFIG = Path("/etc/slurm/slurm.conf")  # where Slurm's programs look
DAEMONS = ("munged", "slurmctld", "slurmd")
WRITTEN = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=9000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Why there can be no Slurm here; empty if there can."""
    if absent := [
        name for name in (*DAEMONS, "sbatch") if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    ]:
        return f"not installed: {', '.join(absent)}"
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        return "not installed: snakemake-executor-plugin-slurm"
    if os.geteuid():
        return "needs root"
    return f"{CONFIG} is there: this machine has a Slurm of its own" if CONFIG.exists() else ""


@contextlib.contextmanager
def cluster():
    """A running Slurm; at the end its jobs are cancelled and its daemons stopped. They die with this process, too."""
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        folder, host = Path(made), socket.gethostname().partition(".")[0]
        folder.chmod(0o755)
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "slurm.conf").write_text(WRITTEN.format(folder=folder, host=host))
        CONFIG.parent.mkdir(exist_ok=True)
        CONFIG.symlink_to(folder / "slurm.conf")
        stack.callback(CONFIG.unlink)
        places = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munged = ["--foreground", "--force", *(f"--{key}={folder}/munge.{value}" for key, value in places.items())]
        for command in (["munged", *munged], ["slurmctld", "-D"], ["slurmd", "-D"]):
            stack.enter_context(_daemon(command, folder))
        _wait(lambda: "idle" in _said("sinfo", "-h", "-o", "%T"), folder)
        try:
            yield
        finally:
            _said("scancel", "--user", "root")
            _wait(lambda: not _said("squeue", "-h", "-t", "running,completing,pending"), folder)


@contextlib.contextmanager
def _daemon(command, folder):
    launcher, path = os.getpid(), {"PATH": f"{os.environ['PATH']}:/usr/sbin"}
    with open(folder / f"{command[0]}.out", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | path, preexec_fn=lambda: die_with_parent(launcher)
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()


def _said(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout


def _wait(condition, folder, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.out"))))
        time.sleep(0.5)


if __name__ == "__main__":
    if missing():
        raise SystemExit(missing())
    with cluster(), contextlib.suppress(KeyboardInterrupt):
        print("up; Ctrl-C takes it down", flush=True)
        signal.pause()
