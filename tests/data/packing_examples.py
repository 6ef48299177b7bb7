"""Small indexed datasets whose every token is known, and configurations that pack them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_run import TOKENS

from moba_megatron.config import Config, config_from_dict

EOD = 0


def numbered_stream(lengths: list[int]) -> np.ndarray:
    """Documents of these lengths, one after the other: each token is its place in the stream, counted from 1, and each
    document ends in the end-of-document id."""
    stream = np.arange(1, sum(lengths) + 1)
    stream[np.cumsum(lengths) - 1] = EOD
    return stream


def write_documents(prefix: Path, stream: np.ndarray, lengths: list[int], mask: np.ndarray | None = None) -> None:
    """Write documents by megatron-core's own builder, and beside them which of their tokens count."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in np.split(stream, np.cumsum(lengths)[:-1]):
        builder.add_document(torch.from_numpy(document.astype(np.int64)), [len(document)])
    builder.finalize(f"{prefix}.idx")
    if mask is not None:
        mask.astype(np.uint8).tofile(f"{prefix}.loss_mask.bin")


def packing_config(train: Any, *, length: int = 32, **changes: Any) -> Config:
    """A configuration on this training data, for a model of a few parameters, with `section__key=value` changes."""
    values: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
        "attention": {"block_size": 8},
        "data": {
            "train": train if isinstance(train, list) else str(train),
            "tokenizer": str(TOKENS / "tokenizer"),
            "sequence_length": length,
        },
        "training": {"steps": 5, "global_batch_size": 2},
        "optimizer": {"lr": 1e-3},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return config_from_dict(values)
