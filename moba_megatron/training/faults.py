"""Clean stops: on a signal after the current step, and at once when a rank fails.

Signals only set a flag; the ranks agree on it by an all-reduce at the end of each step, so that all of them save the
same checkpoint. A rank that raises leaves without waiting for collectives that will never come, and takes the others
with it.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

import torch

from moba_megatron.config import ConfigError
from moba_megatron.errors import explained
from moba_megatron.platform.processes import end_job, failure_report
from moba_megatron.runs.claim import RunFolderInUse
from moba_megatron.runs.folder import RunFolder

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class TrainingDiverged(RuntimeError):
    """The loss or the gradient stopped being a number. Nothing of this step is saved."""


class StopRequest:
    """Turns SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP (the terminal is gone) into a stop after the current step. A
    second Ctrl-C leaves at once. Under `nohup`, SIGHUP stays ignored."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        heard = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, device: torch.device) -> str | None:
        """Name of the signal that any rank received, or None. Collective."""
        flag = torch.tensor([self.signal], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        number = int(flag)
        return signal.Signals(number).name if number else None


def leave_after_failure(error: BaseException, run_dir: str, *, keeps: bool = True) -> NoReturn:
    """End the job because of an exception on this rank, without any clean-up that waits for other ranks.

    The first rank to fail prints its traceback and records the failure in the run folder; the others name it in one
    line. The exit code is 1, after Ctrl-C 130, and 2 for a configuration that cannot be used.

    Args:
        keeps: false where it is not the folder's run that failed: the folder stays as it is.
    """
    rank = int(os.environ.get("RANK", "0"))
    known = explained(error)
    words = f"{type(error).__name__}: {error if known is None else known}"
    # These explain themselves; where they were raised helps nobody.
    short = known is not None or isinstance(error, KeyboardInterrupt)
    report = f"[rank {rank}] failed: {words}" if short else failure_report(error)

    def record() -> None:
        folder = RunFolder(run_dir)
        # A folder in use is another process's to write to.
        if keeps and folder.path.is_dir() and not isinstance(error, RunFolderInUse):
            folder.write_status("failed", None, rank=rank, error=words)

    code = 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, ConfigError) else 1
    end_job(error, report, code, record)
