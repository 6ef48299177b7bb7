"""Stopping well: on a signal after the current step, and at once when a rank fails.

Signals only set a flag; the ranks agree on it by an all-reduce at the end of each step, so that all of them save the
same checkpoint. A rank that raises prints its traceback and leaves without waiting for collectives that will never
come, so that the launcher can end the others.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType

import torch

from moba_megatron.checkpoint import CheckpointError
from moba_megatron.platform.processes import leave
from moba_megatron.training.run_folder import RunFolder
from moba_megatron.training.step import TrainingDiverged

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Turns SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 into a stop after the current step. A second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
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


def leave_after_failure(error: BaseException, run_dir: str) -> None:
    """Print an exception with this rank's number, record it in the run folder, and end the process with exit code 1
    (130 after Ctrl-C), without any clean-up that waits for other ranks."""
    rank = os.environ.get("RANK", "0")
    interrupted = isinstance(error, KeyboardInterrupt)
    # These two explain themselves; where they were raised helps nobody.
    short = isinstance(error, CheckpointError | TrainingDiverged | KeyboardInterrupt)
    text = f"{type(error).__name__}: {error}" if short else "".join(traceback.format_exception(error))
    try:
        print(f"[rank {rank}] failed: {text}", file=sys.stderr, flush=True)
        folder = RunFolder(run_dir)
        if folder.path.is_dir():
            folder.write_status("failed", None, rank=int(rank), error=f"{type(error).__name__}: {error}")
    finally:
        leave(130 if interrupted else 1)
