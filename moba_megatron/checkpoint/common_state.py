"""The part of a distributed checkpoint that is not tensors (steps, learning rates, flags), as stored on disk."""

from __future__ import annotations

from pathlib import Path

from moba_megatron.checkpoint.tensors import StoredTensors

COMMON, COMMON_FILE = "common_state", "common.pt"
_ENTRY = f"{COMMON}/shard_0_1"


def read_common(folder: Path) -> bytes | None:
    """The common state as torch pickled it, not unpickled: the file `common.pt`, or since megatron-core 0.19 an entry
    among the tensors. None where there is neither.

    Raises:
        CheckpointError: the list of tensors is damaged, or names more than the classes of a checkpoint.
    """
    if (folder / COMMON_FILE).is_file():
        return (folder / COMMON_FILE).read_bytes()
    stored = StoredTensors(folder)
    return stored.read_bytes(_ENTRY) if _ENTRY in stored.objects else None
