"""A Slurm cluster of this machine alone: munged, slurmctld and one slurmd on loopback, with two null devices as GPUs.

Everything lies in one folder, on free ports; commands find it by SLURM_CONF. The daemons end with the context. They
want to be root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "scancel", "scontrol", "squeue")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
GresTypes=gpu
JobRequeue=1
KillWait=10
ReturnToService=2
MpiDefault=none
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here; None if one can."""
    # Daemons are in folders for administrators, which a user's path may lack.
    missing = [name for name in (*DAEMONS, *COMMANDS) if not _which(name)]
    if missing:
        return f"Slurm is not installed: {', '.join(missing)} missing (slurmctld, slurmd, slurm-client, munge)"
    return None if os.geteuid() == 0 else "slurmd wants to be root"


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path

    def call(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Run a Slurm command and return what it prints."""
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        return subprocess.run(
            [str(part) for part in command], cwd=cwd, env=environment, check=True, capture_output=True, text=True
        ).stdout

    def state(self, job: str) -> str:
        """A job's state, such as PENDING, RUNNING or COMPLETED."""
        words = self.call("scontrol", "show", "job", job).split()
        return next(word.removeprefix("JobState=") for word in words if word.startswith("JobState="))


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons, and end them and their jobs in the end."""
    cluster = Cluster(folder)
    processes: list[subprocess.Popen[bytes]] = []
    _write_files(folder)

    def start(*command: str) -> None:
        with open(folder / f"{command[0]}.log", "ab") as log:
            arguments = [_which(command[0]), *command[1:]]
            environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
            processes.append(subprocess.Popen(arguments, stdout=log, stderr=log, env=environment))

    try:
        start(
            "munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        _wait_until(lambda: (folder / "munge.socket").exists(), "munged opens its socket")
        start("slurmctld", "-D", "-i")
        start("slurmd", "-D", "-N", "localhost")
        _wait_until(lambda: "idle" in _quiet(cluster, "sinfo", "--noheader", "--format=%T"), "the node is idle")
        yield cluster
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            cluster.call("scancel", "--user=root")
            _wait_until(lambda: not cluster.call("squeue", "--noheader"), "all jobs are gone")
        for process in reversed(processes):
            process.terminate()
            process.wait(timeout=30)


def _write_files(folder: Path) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    for number in (0, 1):
        # The device numbers of /dev/null.
        os.mknod(folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
    settings = {"host": socket.gethostname(), "folder": folder, "cpus": os.cpu_count(), "ports": _free_ports(2)}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**settings))
    (folder / "gres.conf").write_text(f"NodeName=localhost Name=gpu File={folder}/gpu[0-1]\n")
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _quiet(cluster: Cluster, *command: str) -> str:
    try:
        return cluster.call(*command)
    except subprocess.CalledProcessError:  # the controller is not up yet
        return ""


def _wait_until(condition, what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.2)
