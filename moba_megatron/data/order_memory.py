"""Check that the order of samples of a run fits into memory: it is made at once, for all steps of the run."""

from __future__ import annotations

from pathlib import Path

import psutil

from moba_megatron.config import Config

# Bytes of rank 0 while the order is made. A document of an epoch: its number, shuffled (int32). A sample: where it
# starts (document and token), and its place in the shuffled order, and a copy of that.
_DOCUMENT, _SAMPLE = 4, 2 * 8 + 2 * 8
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))
_COUNTS = Path("/sys/fs/cgroup/memory.stat")


def order_problem(config: Config, documents: int, samples_per_epoch: float) -> str | None:
    """The problem with the number of samples of a run; None if their order fits.

    Args:
        documents: of all training data together.
        samples_per_epoch: that they make.
    """
    training = config.training
    samples = training.steps * training.global_batch_size
    epochs = samples / max(samples_per_epoch, 1e-9)
    needed, free = samples * _SAMPLE + (epochs + 1) * documents * _DOCUMENT, free_memory()
    if needed <= free:
        return None
    return (
        f"training.steps = {training.steps} x training.global_batch_size = {training.global_batch_size}: the order of "
        f"{samples:.3g} samples, {epochs:.3g} epochs of {documents} documents, takes {needed / 2**30:,.0f} GiB of rank "
        f"0's memory, and {free / 2**30:,.0f} GiB are free: lower training.steps"
    )


def free_memory() -> int:
    """Bytes that this process can still take, of the machine and of its container."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (int(path.read_text(encoding="ascii")) for path in _LIMITS)
        # Files that were read stay in memory as long as nobody wants it.
        counts = dict(line.split() for line in _COUNTS.read_text(encoding="ascii").splitlines())
        cached = int(counts["active_file"]) + int(counts["inactive_file"])
        return min(free, max(limit - used + cached, 0))
    except (OSError, ValueError, KeyError):  # no limit
        return free
