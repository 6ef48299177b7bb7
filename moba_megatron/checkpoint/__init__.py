"""Distributed checkpoints: written in the background, published atomically, verified before they are read."""

from moba_megatron.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    NotFinite,
    SaveError,
    find_latest,
    list_checkpoints,
)
from moba_megatron.checkpoint.reader import load_model, load_training
from moba_megatron.checkpoint.state import TrainingState
from moba_megatron.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointError",
    "CheckpointWriter",
    "Manifest",
    "NotFinite",
    "SaveError",
    "TrainingState",
    "find_latest",
    "list_checkpoints",
    "load_model",
    "load_training",
]
