"""What a distributed checkpoint holds beside tensors (steps, learning rates, flags), as it lies on disk."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch.distributed.checkpoint import LoadPlan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from moba_megatron.checkpoint.pickles import SafeReader

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
    reader = SafeReader(folder)
    metadata = reader.read_metadata()
    if _ENTRY not in metadata.state_dict_metadata:
        return None
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    index, nothing = MetadataIndex(_ENTRY), torch.Size((0,))
    item = ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)
    into = _Into()
    reader.read_data(reader.prepare_local_plan(LoadPlan([item])), into).wait()
    return into.value


class _Into:
    """Where the reader puts what it reads: the part of a planner that it calls."""

    def __init__(self):
        self.value = b""

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        self.value = value.read()
