"""`model.init_from`: the weights that a new run starts with, from a Hugging Face folder or from a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moba_megatron.checkpoint import CheckpointError, Manifest, load_model
from moba_megatron.checkpoint.find import find_checkpoint, saved_config
from moba_megatron.config import Config, ConfigError, ModelConfig
from moba_megatron.config.overrides import MISSING
from moba_megatron.config.pretrained import pretrained_model_section
from moba_megatron.config.router import SHAPE
from moba_megatron.convert.export_digests import export_damage, refuse_damage
from moba_megatron.convert.half_precision import F16, half_precision_note
from moba_megatron.convert.indexes import Indexes
from moba_megatron.convert.origin import keep_origin
from moba_megatron.convert.run_inputs import found_config
from moba_megatron.convert.safetensors_folder import SafetensorsFolder
from moba_megatron.convert.weights import open_weights, read_weights
from moba_megatron.corpus.blend import blend_entries
from moba_megatron.corpus.indexed import load_index
from moba_megatron.corpus.manifest import load_manifest
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.model.block_router import is_of_index
from moba_megatron.model.index_weights import copy_indexes
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.runs.folder import RunFolder

logger = logging.getLogger(__name__)

# Drawn weights are replaced, other positions are a way to extend the context, and the rest says where it comes from.
_FREE = ("init_from", "init_method_std", "max_position_embeddings", "export_as", "rotary_")
# How experts are kept busy in training, and what their router computes in, change no weight.
_FREE += (
    *("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_load_balancing_type", "moe_router_bias_update_rate"),
    *("moe_router_dtype", "moe_expert_capacity_factor", "moe_token_drop_policy", "moe_pad_expert_input_to_capacity"),
)
# Which channels are rotated is no such way.
_FIXED = ("rotary_percent",)


def check_initial_weights(config: Config, vocab_size: int) -> list[str]:
    """Check that the source of the first weights fits the model, before any process group starts.

    Args:
        vocab_size: entries of `data.tokenizer`, which count where `model.vocab_size` is not set.

    Returns:
        Further notes besides `describe_weights`, one line each.

    Raises:
        ConfigError: with one line for each size, tensor or tokenizer that does not fit.
    """
    if config.model.init_from is None:
        return []
    require_source(config)
    source = Path(config.model.init_from)
    given = ModelConfig.model_validate(pretrained_model_section(source))
    model = sized(config.model, vocab_size)
    differing = _differences(model, sized(given, vocab_size))
    problems = [
        f"model.{key} = {ours}, but {source} has {theirs}: leave the key out, or set it to the same"
        for key, (ours, theirs) in differing.items()
        if key in _FIXED or not key.startswith(_FREE)
    ]
    if model.num_moe_experts and given.num_moe_experts is None:
        problems = [
            f"model.num_moe_experts = {model.num_moe_experts}, but {source} is dense: turn it into a mixture by "
            f"moba-megatron import-hf {source} OUT --upcycle-experts {model.num_moe_experts}, and start from that"
        ]
    if problems:
        raise ConfigError(problems)
    tokenizer = Tokenizer(config.data.tokenizer)
    _check_tokenizer(config, source, tokenizer)
    if _is_huggingface(source):
        dtypes = sorted(set(open_weights(source, model).dtypes.values()))
        lines = [f"model.init_from: {half_precision_note(config.training.precision)}"] if F16 in dtypes else []
    else:
        _check_own_parameters(config, _find(source))
        lines = []
    _check_index(config, source)
    if _adds_index(config, source):
        lines.append(f"attention.router = index: {source} has none, it is {config.attention.router_init}")
    elif config.attention.router_init == "copied":
        lines.append(f"attention.router_init = copied has no effect: {source} has an index of its own")
    lines += _without_beginning(config, tokenizer)
    rotary = {key: values for key, values in differing.items() if key.startswith("rotary_")}
    lines += [
        f"model.{key} = {ours}: the weights come from a model with {theirs}" for key, (ours, theirs) in rotary.items()
    ]
    window = config.model.window
    if not rotary and window and config.data.sequence_length > window:
        lines.append(
            f"data.sequence_length = {config.data.sequence_length} is longer than the {window} tokens of {source}, "
            f"and the rotary embedding is unchanged: later positions are new to the model; model.rotary_scaling "
            "(yarn), rotary_interpolation or a larger rotary_base extend it"
        )
    return lines


def require_source(config: Config) -> None:
    """Raise ConfigError where a recipe leaves it to the user which weights a training starts from."""
    if config.model.init_from == MISSING:
        raise ConfigError([
            f"model.init_from = {MISSING}: give the weights that this training starts from (a Hugging Face folder, a "
            "run folder or a checkpoint), for instance model.init_from=models/Llama-3.1-8B; null starts from random "
            "weights"
        ])  # fmt: skip


def describe_weights(config: Config, resume: Path | None) -> str:
    """Where the weights of a start come from, in one line.

    Args:
        resume: the checkpoint that the run continues from, None for a new run.

    Raises:
        ConfigError: there are none at `model.init_from`.
    """
    if resume is not None:
        return f"weights: from checkpoint {resume}, step {Manifest.read(resume).step}"
    if config.model.init_from is None:
        return f"weights: random, seed {config.run.seed}"
    if config.model.init_from == MISSING:
        return f"weights: not given yet, model.init_from = {MISSING}"
    source = Path(config.model.init_from)
    if _is_huggingface(source):
        dtypes = sorted(set(SafetensorsFolder(source).dtypes.values()))
        return f"weights: from {source} (Hugging Face, {', '.join(dtypes)})"
    checkpoint = _find(source)
    return f"weights: from checkpoint {checkpoint}, step {Manifest.read(checkpoint).step}"


def load_initial_weights(config: Config, vocab_size: int, chunks: list[torch.nn.Module]) -> None:
    """Fill the model chunks of this rank from `model.init_from`, and note in the run folder where they come from.
    Collective.

    Args:
        vocab_size: entries of the vocabulary, without padding.
        chunks: bare model chunks, before an optimizer copies their weights.

    Raises:
        CheckpointError, ConfigError: weights that are damaged or not finite, each by name.
    """
    source = Path(config.model.init_from)
    if torch.distributed.get_rank() == 0:
        keep_origin(RunFolder(config.run.dir), source)
    if _is_huggingface(source):
        if config.checkpoint.verify:
            _verify_together(source)
        model = sized(config.model, vocab_size)
        read_weights(chunks, open_weights(source, model), model, advance=log_progress)
    else:
        leave_out = {"leave_out": is_of_index} if _adds_index(config, source) else {}
        load_model(_find(source), chunks, check_files=config.checkpoint.verify, **leave_out)
    if _adds_index(config, source) and config.attention.router_init == "copied":
        copy_indexes(chunks)


def _adds_index(config: Config, source: Path) -> bool:
    """Whether the model has an index and its first weights have none; it was drawn when the model was built."""
    return config.attention.router == "index" and _stored_indexes(source) is None


def _stored_indexes(source: Path) -> Indexes | None:
    """Those of the first weights; None without."""
    return Indexes.of_folder(source) if _is_huggingface(source) else _indexes_of(saved_config(_find(source)))


def _indexes_of(config: Config) -> Indexes | None:
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    return Indexes.of_config(config.attention, schedule)


def _verify_together(export: Path) -> None:
    """Compare the files of this package's own export with its digests, each rank its share; other folders pass. All
    ranks raise if any found a problem."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: list[list[str]] = [[] for _ in range(ranks)]
    torch.distributed.all_gather_object(found, export_damage(export, rank, ranks))
    refuse_damage(export, [line for lines in found for line in lines])


def sized(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """A `model` section with every size given, to compare two of them."""
    return model.model_copy(
        update={
            "vocab_size": model.vocab_size or vocab_size,
            "num_query_groups": model.query_groups,
            "kv_channels": model.head_size,
            "ffn_hidden_size": model.ffn_size,
            "moe_ffn_hidden_size": model.expert_ffn_size if model.num_moe_experts else None,
        }
    )


def log_progress(done: int, total: int) -> None:
    """Say how far reading is, at every tenth."""
    if done * 10 // total > (done - 1) * 10 // total:
        logger.info("reading weights: %d of %d parameters", done, total)


def _check_own_parameters(config: Config, checkpoint: Path) -> None:
    """Filters of keys and an index are parameters: a checkpoint has them or not. Plain Hugging Face weights start with
    filters of zero, which have no effect. An index may be added, but is not lost."""
    ours, theirs = config.attention, saved_config(checkpoint).attention
    names = ("key_convolution", *(SHAPE if theirs.router == "index" else ()))
    problems = []
    for name in names:
        if (own := getattr(ours, name)) != (given := getattr(theirs, name)):
            instead = "leave it out" if given is None else f"set it to {given}"
            problems.append(f"attention.{name} = {own}, but {checkpoint} was trained with {given}: {instead}")
    if problems:
        raise ConfigError(problems)


def _check_index(config: Config, source: Path) -> None:
    """An index of the first weights is taken over as it is, in the same layers: none is lost, none begins anew."""
    theirs, ours = _stored_indexes(source), _indexes_of(config)
    if theirs is None:
        return
    if ours is None:
        raise ConfigError([
            f"attention.router = own, but {source} has an index that chooses its blocks: set attention.router: index "
            f"and {', '.join(f'{key}: {value}' for key, value in theirs.settings.items())}"
        ])  # fmt: skip
    if differences := ours.differences(theirs):
        raise ConfigError([f"the index of {source} is another one: {line}" for line in differences])


def _all_chats(recipe: dict[str, Any]) -> bool:
    """Whether all documents of a corpus were written by a chat template, which begins them as it likes."""
    sources = recipe.get("sources", [])
    return bool(sources) and all(source.get("messages_column") for source in sources)


def _without_beginning(config: Config, tokenizer: Tokenizer) -> list[str]:
    """A line if the tokenizer puts a token before texts, and the data do not have it."""
    try:
        path = blend_entries(config.data.train)[0].path
        manifest = load_manifest(Path(path).parent)
        if manifest is not None and _all_chats(manifest.identity.get("recipe", {})):
            return []
        start = tokenizer.beginnings("auto")["prompt"]
        if not start:
            return []
        index = load_index(path)
        first = np.fromfile(f"{path}.bin", index.dtype, len(start), offset=int(index.offsets[0]))
    except (OSError, ValueError, IndexError):  # others tell what is wrong with the data
        return []
    if first.tolist() == start:
        return []
    token = tokenizer.decode(start)
    return [
        f"data.train = {path}: its documents do not begin with {token!r}, which the tokenizer puts before a text; if "
        f"the model was trained with it (Llama, Mistral), prepare the data with 'tokenizer.begin_of_document={token}'"
    ]


def _is_huggingface(source: Path) -> bool:
    return (source / "config.json").is_file()


def _find(source: Path) -> Path:
    try:
        return find_checkpoint(source)
    except CheckpointError as error:
        raise ConfigError([f"model.init_from: {error}"]) from error


def _differences(ours: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[object, object]]:
    before, now = (
        {**model.model_dump(), "rotary_attention_factor": model.attention_factor} for model in (theirs, ours)
    )
    return {key: (now[key], before[key]) for key in now if now[key] != before[key]}


def _check_tokenizer(config: Config, source: Path, tokenizer: Tokenizer) -> None:
    """Weights are valid only for the ids of one tokenizer. Which of its tokens ends documents is free."""
    folder, theirs = source, ""
    if not _is_huggingface(source):
        checkpoint = _find(source)
        theirs = Manifest.read(checkpoint).data["tokenizer"]
        folder = Path(found_config(checkpoint).data.tokenizer)
    elif not (source / "tokenizer.json").is_file():
        return
    if theirs != tokenizer.fingerprint and (folder / "tokenizer.json").is_file():
        try:
            theirs = Tokenizer(folder, tokenizer.eod_token).fingerprint
        except ValueError as error:  # without the token that ends documents
            theirs = theirs or str(error)
    if theirs != tokenizer.fingerprint:
        raise ConfigError([
            f"data.tokenizer = {config.data.tokenizer} (fingerprint {tokenizer.fingerprint}) is not the tokenizer of "
            f"model.init_from = {source} ({theirs}): prepare the data with that one"
        ])  # fmt: skip
