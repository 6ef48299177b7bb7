"""Jobs that can be killed: ranks forked from a process that has imported everything, or a command as a user starts it.

Each job is a family of sessions, so that whatever it started, and whatever outlives it, can be found and counted.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from moba_megatron import platform
from moba_megatron.temporary import keep_temporary_files_together, remove_temporary_files

ROOT = Path(__file__).parents[2]
# A run whose rank died ends within seconds; this is for a machine with other work.
SECONDS_TO_END = 120.0
# Ranks under torchrun lead sessions of their own.
_MARK = "MOBA_KILL_LOOP_JOB"


class Fault(AssertionError):
    """Something that must not be after a kill."""


@dataclass
class Job:
    """Processes that work together; `pids` are its ranks, or its launcher."""

    pids: list[int]
    log: Path
    mark: str = ""
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> bool:
        """Whether all of them have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float) -> bool:
        """Wait for the end; False if it did not come in time."""
        deadline = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    @property
    def ended_well(self) -> bool:
        return all(code == 0 for code in self.codes.values())

    def relatives(self) -> list[psutil.Process]:
        """Everything alive in the sessions that the job's processes lead, or with its mark in the environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.Error, PermissionError):
                ours = os.getsid(process.pid) in self.pids
                ours = ours or (self.mark and process.environ().get(_MARK) == self.mark)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self, choice: random.Random) -> None:
        """Kill one of its processes, or all of them at once."""
        living = [pid for pid in self.pids if pid not in self.codes]
        victims = living if choice.random() < 0.3 else [choice.choice(living)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def bury(self) -> None:
        """Wait until nothing of it is left.

        Raises:
            Fault: some process stays.
        """
        ended = self.wait(SECONDS_TO_END)
        # A process that is still importing notices afterwards that its parent is gone.
        deadline = time.monotonic() + SECONDS_TO_END
        while (left := self.relatives()) and time.monotonic() < deadline:
            time.sleep(0.02)
        names = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                names.append(f"{process.pid} {' '.join(process.cmdline()[:4])}")
                process.kill()
        for pid in set(self.pids) - set(self.codes):
            os.kill(pid, signal.SIGKILL)
        if not ended or left:
            raise Fault(f"processes stay: {names}, ranks without an end: {not ended}\n{self.log.read_text()[-3000:]}")


def fork_ranks(ranks: int, work: Callable[[], Any], folder: Path) -> Job:
    """Start ranks of a process group of their own, each a fork of this process, that do some work."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not within reach of what looks for leftovers.
    rendezvous = Path(tempfile.mkdtemp(dir=folder)) / "rendezvous"
    log = folder / "log"
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _be_rank(rank, ranks, work, rendezvous, log)
        pids.append(pid)
    return Job(pids, log)


def _be_rank(rank: int, ranks: int, work: Callable[[], Any], rendezvous: Path, log: Path) -> None:
    code = 1
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        keep_temporary_files_together()
        platform.apply("cpu")
        platform.start_process_group(
            init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, timeout_seconds=SECONDS_TO_END / 2
        )
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        remove_temporary_files()
        os._exit(code)


def start_command(command: list[str], folder: Path) -> Job:
    """Start a command as a user does, in a session of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    mark = f"{os.getpid()}.{time.monotonic_ns()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), _MARK: mark}
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment, start_new_session=True
        )
    # Reaped by `poll` alone.
    process.returncode = 0
    return Job([process.pid], log, mark)
