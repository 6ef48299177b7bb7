"""The checkpoint from which a run continues, and the settings that must not differ from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moba_megatron.checkpoint import CheckpointError, find_latest
from moba_megatron.checkpoint.manifest import NAME, Manifest
from moba_megatron.config import Config, ConfigError
from moba_megatron.config.paths import counted_from
from moba_megatron.config.router import SHAPE
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.runs.folder import RunFolder

# What may differ between the processes of one run: where it writes, what it shows, how the work is spread, what its
# exports say.
FREE = (
    "run.dir",
    "run.threads",
    "run.stall_seconds",
    "model.max_position_embeddings",
    "model.export_as",
    "attention.backend",
    "attention.full_backend",
    "attention.workspace_bytes",
    "parallel",
    "training.stop_after",
    "training.micro_batch_size",
    "training.recompute",
    "training.recompute_layers",
    "training.mlp_chunk_size",
    "training.offload",
    "training.loss_chunk_size",
    "training.on_divergence",
    "training.max_divergences",
    "training.skip_batches",
    "training.spike_threshold",
    "training.spike_window",
    "training.on_spike",
    "training.replay",
    "checkpoint",
    "evaluation",
    "logging",
    "data.validation",
    "data.index_cache",
)


_OF_INDEX = ("attention.router_loss", "attention.router_loss_coeff")


def find_resume(config: Config, schedule: AttentionSchedule, data: dict[str, str]) -> Path | None:
    """The checkpoint from which this run continues, or None for a new run.

    Args:
        data: the identity of tokenizer and training data, as a checkpoint's manifest records it.

    Raises:
        ConfigError: the run folder or the named checkpoint cannot be used, with every difference in the way.
    """
    chosen = chosen_checkpoint(config)
    if chosen is not None:
        try:
            manifest = Manifest.read(chosen)
        except CheckpointError as error:
            raise ConfigError([str(error)]) from error
        if "train" not in manifest.data:
            raise ConfigError([
                f"{chosen} is an imported model, not a training to continue: choose another run.dir than "
                f"{config.run.dir}, and start from these weights with model.init_from={RunFolder.of(chosen)}"
            ])  # fmt: skip
        problems = differences(manifest, config, schedule, data)
        if problems:
            raise ConfigError([f"{chosen} belongs to a run with other settings", *problems])
    return chosen


def chosen_checkpoint(config: Config) -> Path | None:
    """The checkpoint that `checkpoint.resume` asks for, whether it fits or not; None for a new run.

    Raises:
        ConfigError: it is not there, or may not be taken.
    """
    folder, resume = RunFolder(config.run.dir), config.checkpoint.resume
    own = find_latest(folder.checkpoints)
    if resume == "never":
        if own or folder.metrics.is_file():
            raise ConfigError([
                f"checkpoint.resume = never, but {folder.path} already holds a run: choose another run.dir, "
                "or continue it with checkpoint.resume=auto"
            ])  # fmt: skip
        return None
    return own if resume == "auto" else _named_checkpoint(Path(resume), own)


def _named_checkpoint(named: Path, own: Path | None) -> Path:
    """A named checkpoint starts a run; once the run has checkpoints of its own, it continues from the newest of
    these."""
    if not (named / NAME).is_file():
        raise ConfigError(
            [
                f"checkpoint.resume = {named}: no complete checkpoint there (auto, never, or a step_N folder)"
                + counted_from(named)
            ]
        )
    if own is not None and named.resolve() != own.resolve() and named.resolve().parent == own.resolve().parent:
        raise ConfigError(
            [f"checkpoint.resume = {named}: the run already has {own.name}; to go back, choose another run.dir"]
        )
    return named if own is None else own


def differences(manifest: Manifest, config: Config, schedule: AttentionSchedule, data: dict[str, str]) -> list[str]:
    """Forbidden differences from a checkpoint's run: one line each, with both values and the way to allow it."""
    allowed = (*FREE, *config.checkpoint.allow_changed)

    def free(key: str) -> bool:
        return any(key == name or key.startswith(name + ".") for name in allowed)

    before, now = _flatten(_with_defaults(manifest.config)), _flatten(_compared(config))
    fixed = {f"attention.{name}": "it is parameters" for name in ("key_convolution", *SHAPE)}
    held = "it is what the optimizer holds"
    fixed["training.train_only"] = held
    if "none" in (before.get("attention.router_loss"), now.get("attention.router_loss")):
        fixed["attention.router_loss"] = held
    changed = [
        (key, f"{key} = {now.get(key)!r}, but the run has {before.get(key)!r}")
        for key in sorted(before.keys() | now.keys())
        # Schedules are compared by what they mean.
        if before.get(key) != now.get(key) and (key in _OF_INDEX or not key.startswith("attention."))
        if key not in fixed
    ]
    for line in schedule.differences(AttentionSchedule.from_dict(manifest.schedule)):
        changed.append(("attention", f"attention: {line} in the run's schedule"))
    for name, key in (("tokenizer", "data.tokenizer"), ("train", "data.train")):
        if manifest.data.get(name) != data.get(name):
            line = f"{key}: the files or their shares differ from those of the run"
            changed.append((key, line))
    problems = [
        f'{line}: set it back, or allow it by checkpoint.allow_changed=["{key}"]'
        for key, line in changed
        if not free(key)
    ]
    problems += [
        f"{key} = {now.get(key)}, but the run has {before.get(key)}: {why}; set it back"
        for key, why in fixed.items()
        if before.get(key) != now.get(key)
    ]
    return problems


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration with settings that are younger than it at their defaults; as it is where it cannot
    be read today."""
    try:
        return _compared(Config.model_validate(values))
    except ValidationError:
        return values


def _compared(config: Config) -> dict[str, Any]:
    """The values of a configuration, with a default that was once another number as that number."""
    values = config.model_dump(mode="json")
    values["model"]["rotary_attention_factor"] = config.model.attention_factor
    return values


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for name, part in tree.items() for k, v in _flatten(part, f"{prefix}.{name}".strip(".")).items()}
    return {prefix: tree}
