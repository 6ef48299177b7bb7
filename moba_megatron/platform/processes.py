"""Processes that end together: children with their parent, and all ranks of a job with the first that fails.

A rank that raises claims the word in the store through which the ranks found each other, prints its traceback, tells
the others in the store, and leaves at once. The others wait for that in a thread (`watch_for_failure`): they end
within a second, also inside a collective that would wait for its timeout, and also before the process group is
complete; one rank a machine names the cause in a line. Whoever fails later, most often because a connection broke, says
one line as well: the first traceback is that of the first failure. A rank that was killed tells nobody; its neighbours
see their connections close and tell the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from moba_megatron.temporary import remove_temporary_files

# What the collective libraries and the store say when the process at the other end is gone.
LOST_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "Broken pipe",
    "ncclRemoteError",
)
# Keys of the store: ranks that failed, ranks that watch, and what the first failure was.
CLAIMS, WATCHERS, FAILURE = "moba_megatron/failures", "moba_megatron/watchers", "moba_megatron/first_failure"
SECONDS_FOR_LAST_WORDS = 5.0
# torchrun looks at its processes ten times a second and reports those that it finds ended as the cause.
SECONDS_BEHIND = 0.5

# Held while this process says how it ends, so that only one of its threads does.
_ending = threading.Lock()


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """On Linux, send this process a signal when its parent ends, however that ends: a killed launcher leaves no orphan
    ranks behind, and a killed rank no helper processes."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


class _Ties:
    """How many parts of this process want its forks to end with it, and which process these would follow."""

    wanted, parent, registered = 0, 0, False


def forks_die_with_this() -> None:
    """From now on, kill what this process forks when it ends: for libraries that start processes of their own. If the
    parent has already ended, the child ends itself."""
    if not _Ties.registered:
        # What is registered stays for ever, so it asks whether it is wanted.
        os.register_at_fork(before=_remember, after_in_child=_follow)
        _Ties.registered = True
    _Ties.wanted += 1


@contextlib.contextmanager
def forks_die_meanwhile() -> Iterator[None]:
    """As `forks_die_with_this`, for what is forked within."""
    forks_die_with_this()
    try:
        yield
    finally:
        _Ties.wanted -= 1


def _remember() -> None:
    _Ties.parent = os.getpid()


def _follow() -> None:
    if _Ties.wanted:
        die_with_parent()
        if os.getppid() != _Ties.parent:
            os._exit(1)


def leave(code: int) -> NoReturn:
    """End the process after flushing: gloo's own destruction aborts once in a while after a clean end."""
    sys.stdout.flush()
    sys.stderr.flush()
    remove_temporary_files()
    os._exit(code)


def watch_for_failure() -> None:
    """From now on, end this process with exit code 1 and one line as soon as another rank says that it failed.

    Returns at once; without a launcher's store there is nothing to watch. Ends this process where its launcher was
    killed before it could ask to end with it: nobody will answer it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and _orphaned():
        print(f"[rank {_rank()}] the launcher is gone", file=sys.stderr, flush=True)
        leave(1)
    if _store_address():
        threading.Thread(target=_watch, name="watch_for_failure", daemon=True).start()


def job_store(seconds: float) -> dist.Store | None:
    """A connection of its own to the store through which a launcher's processes found each other, for one thread; None
    where there is none that this process may use.

    Args:
        seconds: after so long without an answer, calls raise `torch.distributed.DistError`.
    """
    return _connect(seconds) if _store_address() else None


def end_job(
    error: BaseException, report: str | None = None, code: int = 1, record: Callable[[], None] | None = None
) -> NoReturn:
    """End this process because of a failure, and with it the other ranks of the job. Call from the main thread.

    Args:
        report: what the first rank to fail prints, by default the traceback. Later ones print one line that names the
            first failure, and nothing where the first was the same error on the same machine.
        code: exit code of this process.
        record: called on the first rank to fail, after it has told the others.
    """
    with _ending:
        # The launcher sends it to the ranks that are left once one is gone; the words below come first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            own = {"rank": _rank(), "host": socket.gethostname(), "error": one_line(error)}
            store, first = _claim()
            if first is None:
                print(report or failure_report(error), file=sys.stderr, flush=True)
                if store is not None:
                    _tell(store, own)
                if record is not None:
                    record()
            elif (first["host"], first["error"]) != (own["host"], own["error"]):
                here = "" if lost_connection(error) else f"; here: {own['error']}"
                print(_follows(first) + here, file=sys.stderr, flush=True)
            if first is not None or lost_connection(error):
                time.sleep(SECONDS_BEHIND)
        finally:
            leave(code)


def failure_report(error: BaseException) -> str:
    """The output of the first rank that fails: its number and the traceback, or one line where a broken connection says
    that another rank was faster."""
    if lost_connection(error):
        return f"[rank {_rank()}] another rank ended first and closed its connections to this one ({one_line(error)})"
    return f"[rank {_rank()}] failed: " + "".join(traceback.format_exception(error))


def lost_connection(error: BaseException) -> bool:
    """Whether an error only says that the process at the other end of a connection is gone."""
    return any(words in str(error) for words in LOST_CONNECTION)


def one_line(error: BaseException) -> str:
    """An exception's class and message on one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _watch() -> None:
    first = None
    # The store ends with the launcher, and a launcher takes its processes with it.
    with contextlib.suppress(dist.DistError):
        store = _connect(seconds=600.0)
        store.add(WATCHERS, 1)
        while first is None:
            with contextlib.suppress(dist.DistStoreError):  # nothing yet
                first = json.loads(store.get(FAILURE))
    if first is not None:
        with _ending:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # one voice a machine
                print(_follows(first), file=sys.stderr, flush=True)
            time.sleep(SECONDS_BEHIND)
            leave(1)


def _orphaned() -> bool:
    """Whether the first process of this machine or container has adopted this one, and is not a launcher itself."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    launches = any(b"torch" in word or word.endswith(os.fsencode(sys.argv[0])) for word in command)
    return os.getppid() == 1 and not launches


def _tell(store: dist.Store, failure: dict[str, Any]) -> None:
    """Tell the ranks that watch. The store may end with this machine's launcher, so wait a little for those that are
    still starting."""
    deadline = time.monotonic() + SECONDS_FOR_LAST_WORDS
    with contextlib.suppress(dist.DistError):
        while store.add(WATCHERS, 0) < int(os.environ["WORLD_SIZE"]) and time.monotonic() < deadline:
            time.sleep(0.05)
        store.set(FAILURE, json.dumps(failure))


def _claim() -> tuple[dist.Store | None, dict[str, Any] | None]:
    """The job's store, if it can be reached, and the failure of the rank that failed before this one, if one did."""
    if not _store_address():
        return None, None
    try:
        store = _connect(seconds=SECONDS_FOR_LAST_WORDS)
        if store.add(CLAIMS, 1) == 1:
            return store, None
    except dist.DistError:
        return None, None
    try:
        return store, json.loads(store.get(FAILURE))
    except dist.DistError:  # it died before it could say more
        return store, {"rank": "unknown", "host": "unknown", "error": "it could not say why"}


def _follows(first: dict[str, Any]) -> str:
    return f"[rank {_rank()}] another rank ended first: rank {first['rank']} on {first['host']}: {first['error']}"


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _store_address() -> tuple[str, int] | None:
    """Host and port of the job's store; None for a single process, and where the store may still hold the failure of
    an earlier attempt of a launcher that restarts its processes."""
    environment = os.environ
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    kept_over_restarts = restarts and environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") != "1"
    if environment.get("WORLD_SIZE", "1") == "1" or "MASTER_ADDR" not in environment or kept_over_restarts:
        return None
    return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])


def _connect(seconds: float) -> dist.TCPStore:
    """A connection of its own, because a thread that waits in one blocks it."""
    host, port = _store_address()
    timeout = datetime.timedelta(seconds=seconds)
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
