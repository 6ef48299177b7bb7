"""A trained model from a run folder, for whatever comes after training: evaluation, generation, export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from moba_megatron.checkpoint.manifest import NAME, CheckpointError, Manifest, find_latest
from moba_megatron.checkpoint.reader import load_model
from moba_megatron.config import Config, ParallelConfig, config_from_dict
from moba_megatron.model.builder import build_model
from moba_megatron.model.core_attention import set_attention_stage
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.platform.start import start_single_rank


@dataclass
class OpenedModel:
    """A model in evaluation mode that attends as at its last training step, and where it came from."""

    model: list[torch.nn.Module]
    config: Config
    schedule: AttentionSchedule
    step: int
    checkpoint: Path
    device: torch.device

    @property
    def folder(self) -> Path:
        """As `run_folder`."""
        return run_folder(self.checkpoint)


def run_folder(checkpoint: Path) -> Path:
    """The run folder of a checkpoint, wherever it was moved; the folder beside it if it stands alone."""
    parent = checkpoint.parent
    return parent.parent if parent.name == "checkpoints" else parent


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: a checkpoint folder itself, or the newest one of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    found = path if (path / NAME).is_file() else find_latest(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path} is neither a checkpoint nor a run folder with a complete checkpoint")
    return found


def saved_config(checkpoint: Path) -> Config:
    """The configuration a checkpoint was trained with, on one rank (any layout loads at any other) and with the
    backends that `auto` takes: those of training may not be here."""
    values = Manifest.read(checkpoint).config
    attention = {**values["attention"], "backend": "auto", "full_backend": "auto"}
    return config_from_dict({**values, "attention": attention, "parallel": ParallelConfig().model_dump()})


def open_model(path: str | Path, tokenizer_fingerprint: str, vocab_size: int) -> OpenedModel:
    """Start this process as a single rank, whatever launcher's variables are around, and load a model into it.

    Args:
        tokenizer_fingerprint: of the tokenizer that is at hand.
        vocab_size: size of that tokenizer, used where the configuration leaves `model.vocab_size` to it.

    Raises:
        ValueError: torchrun started several of these.
        CheckpointError: no complete checkpoint there, a damaged one, or one that was trained with another tokenizer.
    """
    checkpoint = find_checkpoint(path)
    config = saved_config(checkpoint)
    trained_with = Manifest.read(checkpoint).data["tokenizer"]
    if trained_with != tokenizer_fingerprint:
        raise CheckpointError(
            f"{checkpoint} was trained with the tokenizer of fingerprint {trained_with}, but data.tokenizer = "
            f"{config.data.tokenizer} has {tokenizer_fingerprint}: put the old one back"
        )
    device = start_single_rank(config.run.seed)
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    model = build_model(config, config.model.vocab_size or vocab_size, schedule)
    step = load_model(checkpoint, model, check_files=config.checkpoint.verify).step
    set_attention_stage(model, schedule, schedule.stage_at(max(step, 1), config.training.steps))
    for chunk in model:
        chunk.eval()
    return OpenedModel(model, config, schedule, step, checkpoint, device)
