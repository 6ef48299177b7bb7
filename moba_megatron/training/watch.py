"""Stalled runs: after `run.stall_seconds` without progress, name the rank and where it waits.

Every ten seconds a thread on each rank writes a sign of life into the store of the process groups: a count, the rank's
activity, and, if that takes long, the innermost frames of its main thread. A stopped rank (SIGSTOP, a debugger, a
machine that swaps or is gone) gives no sign; a stuck one gives its frames. Rank 0 reads the signs, prints its findings
and writes them into the status. If rank 0 itself is silent, rank 1 prints them. The run does not end here: collectives
have their own timeouts.

The main thread only notes its activity once a step, so the cost is small.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moba_megatron.platform.processes import job_store

BEAT_SECONDS = 10.0
# Frames that say what a thread waits in: the innermost ones.
_FRAMES = 4
# Ranks that one report names with their frames.
_MOST_RANKS = 8
_KEY = "moba_megatron/signs/"


@dataclass
class _Seen:
    """The last sign of a rank, and when it came."""

    sign: dict[str, Any] = field(default_factory=dict)
    at: float = 0.0


class Watch:
    """A context manager around a training; see the module.

    Args:
        seconds: without progress, before anything is said; None: no thread is started.
        write: on rank 0, writes the step and what is known into the status.
    """

    def __init__(self, seconds: float | None, write: Callable[..., None] | None = None):
        self.seconds, self.write = seconds, write
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.beat = min(BEAT_SECONDS, seconds / 3) if seconds else BEAT_SECONDS
        self._doing: tuple[str, int, float] = ("the start", 0, time.monotonic())
        self._said: tuple[str, int] | None = None
        self.has_store = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._main = threading.main_thread().ident

    def at(self, doing: str, step: int) -> None:
        """Note what begins now, from the main thread."""
        self._doing = (doing, step, time.monotonic())

    def __enter__(self) -> Watch:
        if self.seconds is not None:
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            # It may wait for the store; it writes nothing any more.
            self._thread.join(timeout=1.0)

    def _run(self) -> None:
        store = None
        with contextlib.suppress(dist.DistError, OSError):
            store = job_store(seconds=self.beat)
        self.has_store = store is not None
        seen = [_Seen(at=time.monotonic()) for _ in range(self.ranks)]
        count, before = 0, time.monotonic()
        while not self._over.wait(self.beat):
            now = time.monotonic()
            slept, before, count = now - before, now, count + 1
            if slept > max(self.seconds, 3 * self.beat):
                self._say([f"this process itself was stopped, or its machine slept, for {slept:.0f} s"])
                self._begin_anew(seen)
                continue
            sign = self._sign(count)
            answers = self._exchange(store, sign, seen)
            stands_in = self.rank == 1 and self.has_store and (not answers or self._is_silent(seen[0]))
            if self.rank == 0 or stands_in:
                self._look(seen, answers)

    def _sign(self, count: int) -> dict[str, Any]:
        doing, step, since = self._doing
        for_seconds = time.monotonic() - since
        sign = {"count": count, "host": socket.gethostname(), "doing": doing, "step": step, "seconds": for_seconds}
        return {**sign, "frames": self._frames()} if for_seconds > self.seconds / 2 else sign

    def _frames(self) -> list[str]:
        """Where the main thread is, innermost frame first."""
        frame = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frame)[-_FRAMES:] if frame else []
        return [f"{entry.name} ({Path(entry.filename).name}:{entry.lineno})" for entry in reversed(stack)]

    def _exchange(self, store: dist.Store | None, sign: dict[str, Any], seen: list[_Seen]) -> bool:
        """Give this rank's sign, and take those that this rank looks at. False: the store does not answer."""
        self._note(seen[self.rank], sign)
        if store is None or self.ranks == 1:
            return True
        try:
            store.set(f"{_KEY}{self.rank}", json.dumps(sign))
            wanted = range(self.ranks) if self.rank == 0 or self._is_silent(seen[0]) else range(1)
            for rank in wanted if self.rank < 2 else ():
                if rank != self.rank and store.check([f"{_KEY}{rank}"]):
                    self._note(seen[rank], json.loads(store.get(f"{_KEY}{rank}")))
        except dist.DistError:
            return False
        return True

    def _note(self, seen: _Seen, sign: dict[str, Any]) -> None:
        if sign["count"] != seen.sign.get("count"):
            seen.sign, seen.at = sign, time.monotonic()

    def _is_silent(self, seen: _Seen) -> bool:
        return time.monotonic() - seen.at > 2.5 * self.beat

    def _begin_anew(self, seen: list[_Seen]) -> None:
        for one in seen:
            one.at = time.monotonic()

    def _look(self, seen: list[_Seen], answers: bool) -> None:
        """Say who keeps the run waiting, once for each thing that it waits in."""
        doing, step, since = self._doing
        for_seconds = time.monotonic() - since
        if for_seconds <= self.seconds:
            if self._said is not None:
                self._said = None
                self._report(step, ["the run goes on"], None)
            return
        if self._said == (doing, step):
            return
        self._said = (doing, step)
        # Without a store, as under a launcher that restarts its processes, a rank knows of itself alone.
        known = seen if self.has_store else seen[:1]
        lines, ranks = findings(known, [self._is_silent(one) for one in known], answers)
        head = f"no progress for {for_seconds:.0f} s in {doing} (run.stall_seconds = {self.seconds:g})"
        self._report(step, [head, *lines], {"seconds": round(for_seconds), "doing": doing, "ranks": ranks})

    def _report(self, step: int, lines: list[str], stalled: dict[str, Any] | None) -> None:
        self._say(lines)
        if self.write and not self._over.is_set():
            # The disk may be what does not answer.
            with contextlib.suppress(OSError):
                self.write(max(step - 1, 0), **({"stalled": stalled} if stalled else {}))

    def _say(self, lines: list[str]) -> None:
        print(f"[rank {self.rank}] " + "\n  ".join(lines), file=sys.stderr, flush=True)


def findings(seen: list[_Seen], silent: list[bool], answers: bool) -> tuple[list[str], list[dict[str, Any]]]:
    """What signs say, in lines for a person and as entries for the status: ranks that are silent, then those that do
    something else than wait for others, and those that wait only where there are no such."""
    entries, waiting = [], []
    for rank, (one, gives_none) in enumerate(zip(seen, silent, strict=True)):
        host = one.sign.get("host", "an unknown machine")
        entry = {"rank": rank, "host": host, "doing": one.sign.get("doing", ""), "frames": one.sign.get("frames", [])}
        if gives_none:
            entries.append({**entry, "silent": round(time.monotonic() - one.at), "frames": []})
        elif any("distributed_c10d.py" in frame for frame in entry["frames"]):
            waiting.append(entry)
        else:
            entries.append(entry)
    entries.sort(key=lambda entry: "silent" not in entry)
    named = (entries or waiting)[:_MOST_RANKS]
    lines = [] if answers else ["the store of the job does not answer: its process may be the stalled one"]
    for entry in named:
        who = f"rank {entry['rank']} on {entry['host']}"
        if "silent" in entry:
            lines.append(f"{who} gives no sign of life for {entry['silent']} s: stopped, or its machine is gone")
        else:
            lines.append(f"{who} is in {entry['doing']}: {' < '.join(entry['frames']) or 'nothing known'}")
    others = len(seen) - len(named)
    if others and entries:
        lines.append(f"{others} others wait" + (f": {' < '.join(waiting[0]['frames'])}" if waiting else ""))
    return lines, named
