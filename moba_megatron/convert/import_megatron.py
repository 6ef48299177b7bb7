"""A checkpoint that Megatron-LM or Megatron-Bridge wrote becomes a run folder of ours: one checkpoint, at step 0.

Only the weights are taken, bit for bit, one parameter at a time. They do not say how heads are split, what the rotary
embedding's base is or how the layers attended: that comes from a `model` section (or the Hugging Face folder that
training started from) and from the attention settings. Where the checkpoint keeps Megatron-LM's flags, the section is
compared with them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from moba_megatron.checkpoint import CheckpointError
from moba_megatron.checkpoint.common_state import read_common
from moba_megatron.config import AttentionConfig, Config, ConfigError, ModelConfig, config_from_dict
from moba_megatron.config.load import explain, read_yaml
from moba_megatron.config.overrides import resolved
from moba_megatron.config.pretrained import pretrained_model_section
from moba_megatron.convert.import_hf import NO_TOKENIZER, copy_tokenizer, start_of_training, write_run
from moba_megatron.convert.mapping import parameter_shapes
from moba_megatron.convert.megatron_flags import differences, read_flags
from moba_megatron.convert.origin import keep_origin
from moba_megatron.convert.publish import check_unused, new_folder
from moba_megatron.convert.stored import StoredWeights
from moba_megatron.convert.weights import canonical_parameters
from moba_megatron.megatron.settings import Attention, attention_plan
from moba_megatron.model.schedule import LayerAttention, kind_of
from moba_megatron.runs.folder import RunFolder

LATEST = "latest_checkpointed_iteration.txt"


def import_megatron(
    source: Path,
    out: Path,
    *,
    model: Path,
    attention: Attention | None,
    sequence_length: int,
    tokenizer: Path | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Config, list[str]]:
    """Import a checkpoint. Starts this process as a single rank.

    Args:
        source: a folder `iter_N` of the format torch_dist, or the `--save` folder for its latest.
        out: the run folder to make; it appears when it is complete.
        model: a Hugging Face folder, a run folder, or a YAML file with a `model` section.
        attention: as for `moba_megatron.megatron.layer_spec`; how the checkpoint was trained to attend.
        sequence_length: tokens of the sequences that it was trained on.
        tokenizer: Hugging Face folder. Default: `model`, if it is one with a tokenizer.

    Returns:
        The written configuration, and notes about the import.

    Raises:
        CheckpointError: no such checkpoint, or parameters that are not those of the model.
        ConfigError: `out` is taken, or settings that cannot work.
    """
    check_unused(out)
    folder = find_iteration(source)
    section = _model_section(model)
    plan = attention_plan(attention, section.num_layers, sequence_length, section.query_groups)
    stored = StoredWeights(folder)
    problems = stored.problems(parameter_shapes(section), section)
    flags = _flags(folder)
    problems += differences(flags, section)
    if problems:
        raise CheckpointError(f"{folder} does not hold the model of {model}: {'; '.join(problems)}")
    config = config_from_dict(
        start_of_training(
            out,
            model=section.model_dump(mode="json"),
            attention=as_section(plan.schedule.stages[plan.stage], plan.file.attention),
            sequence_length=sequence_length,
            exact="bf16" if stored.dtype() == torch.bfloat16 else "fp32",
        )
    )
    with new_folder(out) as unfinished:
        fingerprint = NO_TOKENIZER
        notes = ["no tokenizer was imported: evaluation and generation need one (--tokenizer)"]
        if folder_of_tokenizer := tokenizer or _tokenizer_beside(model):
            fingerprint, notes = copy_tokenizer(folder_of_tokenizer, unfinished / "tokenizer", section.vocab_size)
        config = write_run(unfinished, out, config, lambda chunks: _fill(chunks, stored, advance), fingerprint, folder)
        if model.is_dir():
            keep_origin(RunFolder(unfinished), model)
    if not flags:
        notes.append(
            f"{folder} has no flags: numbers of heads, rotary base and epsilon are those of --model, unchecked"
        )
    return config, notes


def _flags(folder: Path) -> dict[str, Any]:
    """Megatron-LM's flags; empty where the checkpoint has none, as Megatron-Bridge's."""
    common = read_common(folder)
    try:
        return read_flags(common) if common else {}
    except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder}: its flags cannot be read without running its code: {str(error).splitlines()[0]}"
        ) from error


def find_iteration(source: Path) -> Path:
    """The checkpoint folder that a path means.

    Raises:
        CheckpointError: no checkpoint, or one of another format.
    """
    if (source / LATEST).is_file():
        name = (source / LATEST).read_text(encoding="utf-8").strip()
        source = source / (f"iter_{int(name):07d}" if name.isdecimal() else name)
    if (source / ".metadata").is_file():
        return source
    if list(source.glob("mp_rank_*")):
        raise CheckpointError(
            f"{source} has Megatron-LM's older format (mp_rank_*): save it once with --ckpt-format torch_dist "
            "(--ckpt-convert-format torch_dist --ckpt-convert-save FOLDER)"
        )
    raise CheckpointError(
        f"{source} is not a checkpoint of format torch_dist: give a folder iter_N, or the --save folder with {LATEST}"
    )


def as_section(layers: tuple[LayerAttention, ...], given: AttentionConfig) -> dict[str, Any]:
    """An `attention` section that states every layer, for one stage; `given` has what is the same for all."""
    own: dict[str, dict[str, Any]] = {}
    for number, layer in enumerate(layers, start=1):
        own[str(number)] = {"kind": layer.kind}
        if layer.kind == "moba":
            blocks = list(layer.blocks) if isinstance(layer.blocks, tuple) else layer.blocks
            sizes = {"block_size": layer.block_size, "top_k": blocks, "selector": layer.selection.selector}
            own[str(number)] |= sizes
    section = {"kind": kind_of(layers), "layers": own, "key_convolution": given.key_convolution}
    sparse = [layer for layer in layers if layer.kind == "moba"]
    if sparse:
        # One layer's settings as those of the section, so that it names no selector that no layer has.
        first, choices = sparse[0], [layer.selection for layer in sparse]
        section |= {"block_size": first.block_size, "top_k": first.top_k, "selector": first.selection.selector}
        # A selector that looks at no scores says nothing of the summary that the section gave the others.
        scored = [choice for choice in choices if choice.uses_scores] or choices
        section["summary"] = scored[0].summary
        section["share_selection"] = scored[0].share_selection
        section["threshold"] = next((choice.threshold for choice in choices if choice.threshold is not None), None)
        summary, threshold = section["summary"], section["threshold"]
        for number, layer in enumerate(layers, start=1):
            choice = layer.selection
            if layer.kind == "moba" and choice.uses_scores and choice.summary != summary:
                own[str(number)]["summary"] = choice.summary
            if choice.threshold is not None and choice.threshold != threshold:
                own[str(number)]["threshold"] = choice.threshold
    return section


def _model_section(path: Path) -> ModelConfig:
    if path.is_dir():
        values = pretrained_model_section(path)
    else:
        values = resolved(read_yaml(path)).get("model") or {}
        values.pop("init_from", None)
    try:
        section = ModelConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError([f"{path}: model.{explain(item, ModelConfig)}" for item in error.errors()]) from error
    if section.vocab_size is None:
        raise ConfigError([f"{path}: model.vocab_size is not set: give the size of the tokenizer's vocabulary"])
    return section


def _tokenizer_beside(model: Path) -> Path | None:
    """The tokenizer of a Hugging Face folder, or of a run folder."""
    folders = [folder for folder in (model, model / "tokenizer") if (folder / "tokenizer.json").is_file()]
    return folders[0] if folders else None


@torch.no_grad()
def _fill(chunks: list[torch.nn.Module], stored: StoredWeights, advance: Callable[[int, int], None]) -> None:
    todo = [named for chunk in chunks for named in canonical_parameters(chunk)]
    for number, (name, parameter) in enumerate(todo, start=1):
        parameter.copy_(stored.read(name, tuple(parameter.shape)))
        advance(number, len(todo))
