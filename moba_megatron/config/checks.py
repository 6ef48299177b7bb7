"""Checks of several settings together: combinations that cannot work, and sizes that do not fit the number of
processes."""

from __future__ import annotations

import math

from moba_megatron.config.attention import AttentionConfig
from moba_megatron.config.experts import expert_checks
from moba_megatron.config.families import family_checks
from moba_megatron.config.layer_selection import lacks_threshold, layer_selection_checks
from moba_megatron.config.model import ModelConfig
from moba_megatron.config.parallel import ParallelConfig
from moba_megatron.config.rotary import rotary_checks
from moba_megatron.config.router import router_checks, without_index_checks
from moba_megatron.config.schema import Config
from moba_megatron.config.training_checks import training_checks
from moba_megatron.config.words import divisors, nearest_multiples, one_of


class ConfigError(ValueError):
    """A configuration that cannot work. `problems` holds one line for each key."""

    def __init__(self, problems: list[str] | str):
        if isinstance(problems, str):
            # megatron-core raises an error of a layer again, from its text, with the layer's name added.
            self.problems = [problems]
            super().__init__(problems)
            return
        self.problems = problems
        super().__init__("the configuration cannot be used:\n" + "\n".join(f"  - {line}" for line in problems))


def check_world(config: Config, world_size: int) -> int:
    """Check that the parallel sizes fit the number of processes; return the data-parallel size.

    Raises:
        ConfigError: the error names both numbers and valid ones.
    """
    parallel, training = config.parallel, config.training
    model_ranks = parallel.model_ranks
    if world_size % model_ranks:
        sizes = f"parallel.tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
        raise ConfigError([
            f"{sizes} = {model_ranks} does not divide the {world_size} processes: "
            f"start {nearest_multiples(world_size, parallel.fewest_ranks)}"
        ])  # fmt: skip
    if world_size % parallel.expert_ranks:
        sizes = f"parallel.expert {parallel.expert} x expert_tensor {parallel.expert_tensor} x pipeline"
        raise ConfigError([
            f"{sizes} {parallel.pipeline} = {parallel.expert_ranks} does not divide the {world_size} processes: "
            f"start {nearest_multiples(world_size, parallel.fewest_ranks)}"
        ])  # fmt: skip
    data_ranks = world_size // model_ranks
    per_pass = training.micro_batch_size * data_ranks
    if training.global_batch_size % per_pass:
        raise ConfigError([
            f"training.global_batch_size = {training.global_batch_size} is not a multiple of "
            f"micro_batch_size x data-parallel size = {training.micro_batch_size} x {data_ranks} = {per_pass}: "
            f"use {nearest_multiples(training.global_batch_size, per_pass)}"
        ])  # fmt: skip
    for key, samples in [
        ("training.global_batch_size", training.global_batch_size),
        ("evaluation.samples", config.evaluation.samples if config.data.validation else 0),
    ]:
        microbatches = -(-samples // per_pass)
        if parallel.virtual_pipeline and microbatches % parallel.pipeline:
            raise ConfigError([
                f"{key} = {samples} makes {microbatches} microbatches, but the interleaved schedule needs a multiple "
                f"of parallel.pipeline = {parallel.pipeline}: use a multiple of {per_pass * parallel.pipeline}"
            ])  # fmt: skip
    return data_ranks


def combination_problems(config: Config) -> list[str]:
    """Checks of several fields together: one line for each combination that cannot work."""
    return [
        text
        for wrong, text in [
            *_model_checks(config.model, config.parallel),
            *_parallel_checks(config),
            *expert_checks(config),
            *_data_checks(config),
            _packing_check(config),
            *attention_checks(
                config.attention, config.model.num_layers, config.data.sequence_length, config.model.query_groups
            ),
            *router_checks(config),
            *training_checks(config),
        ]
        if wrong
    ]


def _model_checks(model: ModelConfig, parallel: ParallelConfig) -> list[tuple[bool, str]]:
    heads, groups, tp = model.num_attention_heads, model.query_groups, parallel.tensor
    tensor_sizes = one_of(divisors(math.gcd(heads, groups, model.ffn_size)))
    return [
        (
            heads % groups != 0,
            f"model.num_attention_heads = {heads} is not a multiple of model.num_query_groups = {groups}: "
            f"use {one_of(divisors(heads))} groups",
        ),
        (
            model.kv_channels is None and model.hidden_size % heads != 0,
            f"model.hidden_size = {model.hidden_size} is not a multiple of model.num_attention_heads = {heads}: "
            "change one, or set model.kv_channels",
        ),
        *rotary_checks(model),
        *family_checks(model),
        *[
            (size % tp != 0, f"parallel.tensor = {tp} does not divide {key} = {size}: use {tensor_sizes}")
            for key, size in (
                ("model.num_attention_heads", heads),
                ("model.num_query_groups", groups),
                ("model.ffn_hidden_size", model.ffn_size),
            )
        ],
    ]


def _parallel_checks(config: Config) -> list[tuple[bool, str]]:
    parallel = config.parallel
    return [
        (parallel.sequence and parallel.tensor == 1, "parallel.sequence = true needs parallel.tensor of at least 2"),
        (
            parallel.virtual_pipeline is not None and parallel.pipeline == 1,
            f"parallel.virtual_pipeline = {parallel.virtual_pipeline} needs parallel.pipeline of at least 2",
        ),
        *_pipeline_checks(config),
        *_context_checks(config),
        _length_check(config),
    ]


def _pipeline_checks(config: Config) -> list[tuple[bool, str]]:
    layers, parallel, given = config.model.num_layers, config.parallel, config.parallel.pipeline_layers
    virtual = parallel.virtual_pipeline or 1
    chunks = parallel.pipeline * virtual
    if given is None:
        return [(
            layers % chunks != 0,
            f"model.num_layers = {layers} is not a multiple of parallel.pipeline x virtual_pipeline = "
            f"{parallel.pipeline} x {virtual} = {chunks}: use {nearest_multiples(layers, chunks)} layers, or give the "
            "layers of each stage by parallel.pipeline_layers",
        )]  # fmt: skip
    return [
        (parallel.pipeline == 1, f"parallel.pipeline_layers = {given} needs parallel.pipeline of at least 2"),
        (
            len(given) != chunks,
            f"parallel.pipeline_layers = {given} has {len(given)} entries, but parallel.pipeline x virtual_pipeline = "
            f"{parallel.pipeline} x {virtual} = {chunks}: give {chunks}",
        ),
        (
            sum(given) != layers,
            f"parallel.pipeline_layers = {given} adds up to {sum(given)}, but model.num_layers = {layers}: "
            f"{'take out' if sum(given) > layers else 'add'} {abs(sum(given) - layers)}",
        ),
    ]


def _context_checks(config: Config) -> list[tuple[bool, str]]:
    parallel = config.parallel
    levels, names = parallel.hierarchical_context, {parallel.exchange.moba, parallel.exchange.full}
    if levels is None:
        return []
    pairs = [[size, parallel.context // size] for size in divisors(parallel.context)[1:-1]]
    return [
        (
            not names & {"auto", "a2a+p2p"},
            f"parallel.hierarchical_context = {levels} has no effect with parallel.exchange = {one_of(sorted(names))}: "
            "it belongs to a2a+p2p",
        ),
        (
            levels[0] * levels[1] != parallel.context,
            f"parallel.hierarchical_context = {levels} multiplies to {levels[0] * levels[1]}, not to parallel.context "
            f"= {parallel.context}: " + (f"use {one_of(pairs)}" if pairs else "leave it out: that is not a product"),
        ),
    ]


def _length_check(config: Config) -> tuple[bool, str]:
    """Tokens of a sample by the ranks they are split over. Packs are padded instead, document by document, under
    context parallelism."""
    parallel, length = config.parallel, config.data.sequence_length
    context, tensor = parallel.context, parallel.tensor if parallel.sequence else 1
    if context == 1:
        unit, why = tensor, f"parallel.tensor = {tensor} (parallel.sequence)"
    elif tensor == 1:
        unit, why = 2 * context, f"2 x parallel.context = 2 x {context}"
    else:
        unit = context * math.lcm(2, tensor)
        why = f"2 x parallel.context = 2 x {context} and parallel.context x parallel.tensor = {context} x {tensor}"
    padded = context > 1 and config.packed
    return (
        not padded and length % unit != 0,
        f"data.sequence_length = {length} is not a multiple of {why}: use {nearest_multiples(length, unit)}",
    )


def _data_checks(config: Config) -> list[tuple[bool, str]]:
    data = config.data
    return [
        (value == [], f"{key} = []: the blend is empty: give at least one entry with `path` and `weight`")
        for key, value in (("data.train", data.train), ("data.validation", data.validation))
    ]


def _packing_check(config: Config) -> tuple[bool, str]:
    data = config.data
    return (
        data.min_document_length is not None and data.packing != "document",
        f"data.min_document_length = {data.min_document_length} has no effect with data.packing = {data.packing}: set "
        "data.packing: document, or take it out",
    )


def attention_checks(
    attention: AttentionConfig,
    layers: int,
    length: int | None = None,
    kv_heads: int | None = None,
    *,
    keys: tuple[str, str, str] = ("model.num_layers", "data.sequence_length", "model.num_query_groups"),
) -> list[tuple[bool, str]]:
    """Settings of the attention that cannot work: (wrong, what to say) for each.

    Args:
        layers: layers of the whole model that attend.
        length: tokens of a sequence, where that is known.
        kv_heads: key heads of a layer, where that is known.
        keys: what these three are called where the user sets them.
    """
    layers_key, length_key, kv_heads_key = keys
    checks = []
    for name, part in [("attention", attention)] + [
        (f"attention.stages.{i}", s) for i, s in enumerate(attention.stages)
    ]:
        sizes = [(f"{name}.block_size", part.block_size if (part.kind or attention.kind) == "moba" else None)]
        sizes += [(f"{name}.layers.{n}.block_size", layer.block_size) for n, layer in (part.layers or {}).items()]
        checks += [
            (
                size is not None and length is not None and size > length,
                f"{key} = {size} is over {length_key} = {length}",
            )
            for key, size in sizes
        ]
        numbers = [(f"{name}.full_layers", n) for n in part.full_layers or []]
        numbers += [(f"{name}.layers", n) for n in part.layers or {}]
        checks += [
            (not 1 <= n <= layers, f"{key} names layer {n}: layers are counted from 1 to {layers}")
            for key, n in numbers
        ]
        checks.append((
            part.last_n_full is not None and part.last_n_full > layers,
            f"{name}.last_n_full = {part.last_n_full} is over {layers_key} = {layers}",
        ))  # fmt: skip
    checks += _selection_checks(attention)
    checks += without_index_checks(attention)
    checks += layer_selection_checks(attention, kv_heads, kv_heads_key)
    ends = [stage.until for stage in attention.stages]
    rising = all(a < b for a, b in zip(ends, ends[1:], strict=False))
    checks.append((not rising, f"attention.stages: `until` must rise from stage to stage, not {ends}"))
    checks.append((bool(ends) and ends[-1] != 1.0, f"attention.stages: the last `until` must be 1.0, not {ends[-1:]}"))
    return checks


def _selection_checks(attention: AttentionConfig) -> list[tuple[bool, str]]:
    selectors, threshold = attention.selectors, attention.threshold
    names = one_of(sorted(selectors))
    return [
        (
            lacks_threshold(attention),
            "attention.threshold is not set, but the selector `threshold` needs it: give a share such as 0.9",
        ),
        (
            "threshold" not in selectors and threshold is not None,
            f"attention.threshold = {threshold} has no effect with the selector {names}: set attention.selector: "
            "threshold, or take it out",
        ),
        (
            attention.summary != "mean" and not selectors & {"top_k", "threshold"},
            f"attention.summary = {attention.summary} has no effect with the selector {names}, which uses no scores: "
            f"take it out",
        ),
        (
            attention.share_selection != "none" and not selectors <= {"top_k", "threshold"},
            f"attention.share_selection = {attention.share_selection} has no effect with the selector {names}: heads "
            "share scores, and recent and sink_recent look at none; take it out",
        ),
        (
            attention.backend == "flash_moba" and not attention.top_k_of_means,
            f"attention.backend = flash_moba chooses blocks by top_k of their mean keys, each query head for itself, "
            f"not by {names} of {attention.summary} (share_selection: {attention.share_selection}): use auto",
        ),
        (
            attention.workspace_bytes is not None and attention.backend in ("reference", "flash_moba"),
            f"attention.workspace_bytes = {attention.workspace_bytes}: attention.backend = {attention.backend} cannot "
            "be kept to a workspace; take it out, or use auto, triton or gathered",
        ),
    ]
