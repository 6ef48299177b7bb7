"""The parts of a checkpoint that an export needs: its settings, the attention of its last step, its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moba_megatron.checkpoint import CheckpointError, Manifest
from moba_megatron.checkpoint.find import find_checkpoint
from moba_megatron.checkpoint.manifest import damaged, misplaced_files, verify
from moba_megatron.config import Config, ConfigError, ModelConfig
from moba_megatron.convert.families import family_of
from moba_megatron.convert.import_hf import NO_TOKENIZER
from moba_megatron.convert.indexes import Indexes
from moba_megatron.convert.initial import sized
from moba_megatron.convert.run_inputs import found_config
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.model.schedule import AttentionSchedule, LayerAttention
from moba_megatron.runs.folder import RunFolder


@dataclass(frozen=True)
class Exported:
    """Facts about an exported checkpoint: its settings, the attention of its last step, its tokenizer.

    Attributes:
        config: on one rank.
        model: the `model` section with every size stated.
        layers: how each layer attends.
        tokenizer: None where the model has none.
        stored_indexes: of blocks, in all layers that have one in the checkpoint; None: queries and keys choose.
    """

    checkpoint: Path
    manifest: Manifest
    config: Config
    model: ModelConfig
    layers: tuple[LayerAttention, ...]
    tokenizer: Tokenizer | None
    stored_indexes: Indexes | None = None

    @property
    def indexes(self) -> Indexes | None:
        """Those that choose blocks in these layers. Full layers have no use for theirs, which are left out."""
        return self.stored_indexes and self.stored_indexes.of_layers(self.layers)

    @property
    def key_convolution(self) -> int | None:
        """Width of the filters of keys; None where keys are not convolved."""
        return self.config.attention.key_convolution

    def check_files(self, *, digests: bool = True) -> None:
        """Compare the checkpoint's files with its manifest: names and sizes always, digests if both `digests` and
        `checkpoint.verify` of its run are true.

        Raises:
            CheckpointError: damaged files, each by name.
        """
        read = verify if digests and self.config.checkpoint.verify else misplaced_files
        if problems := read(self.checkpoint, self.manifest):
            raise damaged(self.checkpoint, problems)

    def check_plain(self) -> None:
        """Raises ConfigError where no plain model of transformers computes this one."""
        if width := self.key_convolution:
            raise ConfigError([
                f"attention.key_convolution = {width}: no plain model of transformers convolves its keys. Export it "
                f"with --self-contained, which adds the code, and load it with trust_remote_code=True"
            ])  # fmt: skip


def open_exported(path: str | Path, tokenizer: str | None = None, *, own_code: bool = False) -> Exported:
    """What there is to export.

    Args:
        path: a checkpoint folder, or a run folder for its newest one.
        tokenizer: folder of the tokenizer, where it is no longer at `data.tokenizer`.
        own_code: whether the model may need code that is not in transformers (convolved keys).

    Raises:
        CheckpointError: no complete checkpoint, or not the tokenizer that it was trained with.
        ConfigError: it needs code of its own, and may not; or no plain model of transformers computes it.
    """
    checkpoint = find_checkpoint(path)
    manifest, config = Manifest.read(checkpoint), found_config(checkpoint)
    family_of(config.model)
    schedule = AttentionSchedule.from_dict(manifest.schedule)
    layers = schedule.stages[schedule.stage_at(max(manifest.step, 1), config.training.steps)]
    folder = Path(tokenizer or config.data.tokenizer)
    put = f"put it into {RunFolder.of(checkpoint).tokenizer}"
    found = None
    if manifest.data["tokenizer"] != NO_TOKENIZER:
        try:
            found = Tokenizer(folder)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint}: {error}. If it is elsewhere, {put}") from error
        if found.fingerprint != manifest.data["tokenizer"]:
            raise CheckpointError(
                f"{checkpoint} was trained with the tokenizer of fingerprint {manifest.data['tokenizer']}, but "
                f"{folder} has {found.fingerprint}: find the right one and {put}"
            )
    if config.model.vocab_size is None and found is None:
        raise CheckpointError(f"{checkpoint} names neither model.vocab_size nor a tokenizer")
    model = sized(config.model, found.vocab_size if found else 0)
    exported = Exported(
        checkpoint, manifest, config, model, layers, found, Indexes.of_config(config.attention, schedule)
    )
    if not own_code:
        exported.check_plain()
    return exported
