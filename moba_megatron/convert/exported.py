"""What there is to export in a checkpoint: its settings, the attention of its last step, its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moba_megatron.checkpoint import CheckpointError, Manifest
from moba_megatron.checkpoint.find import find_checkpoint, saved_config
from moba_megatron.config import Config, ConfigError, ModelConfig
from moba_megatron.convert.import_hf import NO_TOKENIZER
from moba_megatron.convert.initial import sized
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.model.schedule import AttentionSchedule, LayerAttention


@dataclass(frozen=True)
class Exported:
    """What is known about a checkpoint that is exported: its settings, the attention of its last step, its tokenizer.

    Attributes:
        config: on one rank.
        model: the `model` section with every size stated.
        layers: how each layer attends.
        tokenizer: None where the model has none.
    """

    checkpoint: Path
    manifest: Manifest
    config: Config
    model: ModelConfig
    layers: tuple[LayerAttention, ...]
    tokenizer: Tokenizer | None


def open_exported(path: str | Path, tokenizer: str | None = None) -> Exported:
    """What there is to export.

    Args:
        path: a checkpoint folder, or a run folder for its newest one.
        tokenizer: folder of the tokenizer, where it is no longer at `data.tokenizer`.

    Raises:
        CheckpointError: no complete checkpoint, or not the tokenizer that it was trained with.
        ConfigError: keys are convolved, which models of transformers do not do.
    """
    checkpoint = find_checkpoint(path)
    manifest, config = Manifest.read(checkpoint), saved_config(checkpoint)
    if width := config.attention.key_convolution:
        raise ConfigError([
            f"attention.key_convolution = {width}: no plain model of transformers convolves its keys; moba-megatron "
            "evaluate takes the checkpoint itself"
        ])  # fmt: skip
    schedule = AttentionSchedule.from_dict(manifest.schedule)
    layers = schedule.stages[schedule.stage_at(max(manifest.step, 1), config.training.steps)]
    folder = tokenizer or _tokenizer_folder(checkpoint, config)
    found = None
    if manifest.data["tokenizer"] != NO_TOKENIZER:
        try:
            found = Tokenizer(folder)
        except ValueError as error:
            raise CheckpointError(f"data.tokenizer: {error}. Name its folder with --tokenizer") from error
        if found.fingerprint != manifest.data["tokenizer"]:
            raise CheckpointError(
                f"{checkpoint} was trained with the tokenizer of fingerprint {manifest.data['tokenizer']}, but "
                f"{folder} has {found.fingerprint}: name the right folder with --tokenizer"
            )
    if config.model.vocab_size is None and found is None:
        raise CheckpointError(f"{checkpoint} says neither model.vocab_size nor a tokenizer")
    model = sized(config.model, found.vocab_size if found else 0)
    return Exported(checkpoint, manifest, config, model, layers, found)


def _tokenizer_folder(checkpoint: Path, config: Config) -> Path:
    """As the configuration says, or beside the checkpoint where an imported model was moved."""
    beside = checkpoint.parent.parent / "tokenizer"
    named = Path(config.data.tokenizer)
    return beside if beside.is_dir() and not named.is_dir() else named
