"""Run a function on several ranks, each a process forked from this one.

Forking from a parent that has imported megatron-core makes a start cheap (0.1 s instead of 6 s). Each rank gets one
thread, the platform's differences and a gloo process group over a file; megatron-core's model-parallel groups are
started by the function itself (`start_model_parallel`). Nothing of it reaches the parent, so tests never patch the
process that runs pytest.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0, prepare: bool = True
) -> list[Any]:
    """Call `fn(*args)` on ranks 0 to world_size - 1 and return their results in order.

    Args:
        fn: any callable, also a closure; its result must be picklable.
        timeout: seconds for all ranks together; where each rank hangs is printed shortly before.
        prepare: apply the platform's differences and start the process group before `fn`. False: a bare process.

    Raises:
        AssertionError: with the failing rank's traceback. The other ranks are killed.
        TimeoutError: naming the ranks that had not finished.
    """
    import megatron.core.models.gpt  # noqa: F401  (imported in the parent, so that no child has to)
    import megatron.core.optimizer  # noqa: F401

    if dist.is_initialized():
        raise RuntimeError("this process has a process group: start process groups inside run_ranks only")
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        connections, processes = [], []
        try:
            for rank in range(world_size):
                here, there = context.Pipe()
                rendezvous = f"file://{folder}/rendezvous"
                process = context.Process(
                    target=_rank_main, args=(there, rendezvous, rank, world_size, fn, args, timeout, prepare)
                )
                process.start()
                there.close()
                connections.append(here)
                processes.append(process)
            return _collect(connections, timeout)
        finally:
            for process in processes:
                _kill(process)


def _kill(process: multiprocessing.Process) -> None:
    """End a rank and whatever it started (a checkpoint writer, a queue manager)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not made its process group yet
        process.kill()
    process.join()


def _collect(connections: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(connections):
        pending = [c for rank, c in enumerate(connections) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(connections)) if rank not in results]
            raise TimeoutError(f"ranks {missing} did not finish within {timeout} s")
        for connection in ready:
            rank = connections.index(connection)
            try:
                failure, results[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a result") from None
            if failure:
                raise AssertionError(f"rank {rank} of {len(connections)} failed:\n{failure}")
    return [results[rank] for rank in range(len(connections))]


def _rank_main(
    connection: Connection,
    init_method: str,
    rank: int,
    world_size: int,
    fn: Callable[..., Any],
    args: tuple,
    timeout: float,
    prepare: bool,
) -> None:
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    # pytest's capture replaces sys.stderr by an object without a file descriptor.
    faulthandler.dump_traceback_later(max(1.0, timeout - 2.0), file=sys.__stderr__)
    try:
        if prepare:
            from moba_megatron import platform

            os.environ.pop("RANK", None)
            platform.apply("cpu")
            platform.start_process_group(
                init_method=init_method, rank=rank, world_size=world_size, timeout_seconds=timeout
            )
        message = pickle.dumps((None, fn(*args)))
    except BaseException:  # whatever ends a rank is reported by the parent
        message = pickle.dumps((traceback.format_exc(), None))
    connection.send_bytes(message)
    # Wait to be killed: leaving now would close sockets that slower ranks may still read from.
    time.sleep(timeout)
    os._exit(1)
