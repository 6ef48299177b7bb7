"""Which checkpoint a path means, and the configuration that it was trained with."""

from __future__ import annotations

from pathlib import Path

from moba_megatron.checkpoint.manifest import NAME, CheckpointError, Manifest, find_latest
from moba_megatron.config import Config, ParallelConfig, config_from_dict
from moba_megatron.config.paths import counted_from
from moba_megatron.runs.folder import RunFolder


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: a checkpoint folder itself, or the newest one of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    found = path if (path / NAME).is_file() else find_latest(RunFolder(path).checkpoints)
    if found is None:
        raise CheckpointError(
            f"{path} is neither a checkpoint nor a run folder with a complete checkpoint{counted_from(path)}"
        )
    return found


def saved_config(checkpoint: Path) -> Config:
    """The configuration a checkpoint was trained with, on one rank (any layout loads at any other, see `saved_layout`)
    and with the backends that `auto` takes, in their own workspace: those of training may not be here. Gradients, which
    only training has, are in fp32: in bf16 they would need the layout of training."""
    values = Manifest.read(checkpoint).config
    attention = {**values["attention"], "backend": "auto", "full_backend": "auto", "workspace_bytes": None}
    training = {**values["training"], "gradient_precision": "fp32"}
    alone = ParallelConfig().model_dump()
    return config_from_dict({**values, "attention": attention, "training": training, "parallel": alone})


def saved_layout(checkpoint: Path) -> ParallelConfig:
    """Over how many ranks, and how, a checkpoint was trained when it was saved."""
    return ParallelConfig.model_validate(Manifest.read(checkpoint).config["parallel"])
