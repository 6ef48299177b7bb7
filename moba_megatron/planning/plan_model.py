"""A plan without a configuration: a Hugging Face folder, a length, and the settings that the recipes of continued
pretraining have for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moba_megatron.config import Config
from moba_megatron.config.huggingface import model_section, read_huggingface_config
from moba_megatron.config.literal import literal
from moba_megatron.config.load import config_from_tree

TOKENS_PER_STEP = 2**23
"""As in configs/continued_pretraining."""

# Up to which length which blocks: (tokens, block_size, top_k); docs/planning.md has the table and the reasons.
_BLOCKS = ((2**13, 512, 3), (2**15, 2048, 3), (2**17, 1024, 16), (2**18, 2048, 12), (2**63, 4096, 12))


def blocks_for(length: int) -> tuple[int, int]:
    """(block_size, top_k) of the recipes at this length, or at the next one that they have.

    >>> blocks_for(8192), blocks_for(131072)
    ((512, 3), (1024, 16))
    """
    return next((size, top_k) for tokens, size, top_k in _BLOCKS if length <= tokens)


def config_of_model(folder: Path, length: int, overrides: list[str] | None = None) -> Config:
    """What continued pretraining of a Hugging Face model would be told: its shapes, MoBA with the last three layers
    full, steps of `TOKENS_PER_STEP`. No data and no weights need be there.

    Args:
        folder: with `config.json`.
        length: tokens of a sample.
        overrides: `key.path=value`, which win.

    Raises:
        ConfigError: a model that is not supported, or settings that cannot work.
    """
    section = model_section(read_huggingface_config(folder))
    block_size, top_k = blocks_for(length)
    values: dict[str, Any] = {
        "run": {"dir": literal(f"runs/{folder.resolve().name}")},
        "model": literal(section),
        "attention": {
            "kind": "moba",
            "block_size": min(block_size, length),
            "top_k": top_k,
            "last_n_full": min(3, section["num_layers"]),
        },
        "parallel": {"distributed_optimizer": True, "overlap_grad_reduce": True},
        "data": {"train": "-", "tokenizer": literal(str(folder)), "sequence_length": length, "packing": "best_fit"},
        "training": {"steps": 1000, "global_batch_size": max(1, TOKENS_PER_STEP // length)},
        "optimizer": {"lr": 1e-5, "min_lr": 1e-6, "warmup_steps": 20},
    }
    return config_from_tree(values, overrides)
