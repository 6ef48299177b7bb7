"""The contents of each pipeline stage: its layers, its parameters and its tokens, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from moba_megatron.config import Config, ParallelConfig
from moba_megatron.config.sizes import expert_parameters, router_parameters
from moba_megatron.model.schedule import AttentionSchedule

GRADIENT_BYTES = {"fp32": 4, "bf16": 2}
"""Of one number, by `training.gradient_precision`."""


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, as one of its tensor-parallel ranks sees it.

    Attributes:
        number: from 0; `first` has the embedding, `last` the final norm, the output layer and the loss.
        layers: numbers of its layers, counted from 1, over all its model chunks.
        parameters: of one rank, experts among them; `experts`: those of its experts alone.
        trained, trained_experts: the part of both that learns: `training.train_only` may freeze the rest, and an index
            without a loss is frozen. Frozen weights have neither gradients nor a state of the optimizer.
        in_flight: microbatches whose activations it holds at once, in units of all its layers: with the interleaved
            schedule a fraction.
    """

    number: int
    first: bool
    last: bool
    layers: tuple[int, ...]
    parameters: int
    in_flight: float
    experts: int = 0
    trained: int = 0
    trained_experts: int = 0


def stages_of(config: Config, vocab_size: int, microbatches: int) -> list[Stage]:
    """The pipeline stages of a configuration.

    Args:
        microbatches: of one rank in an optimizer step.
    """
    count, indexed = config.parallel.pipeline, indexed_layers(config)
    frozen, still = config.training.train_only is not None, config.attention.router_loss == "none"
    stages = []
    for number, layers in enumerate(_layer_numbers(config)):
        first, last = number == 0, number == count - 1
        mixtures = sum(config.model.expert_layers[layer - 1] for layer in layers)
        experts = mixtures * experts_of_rank(config) * expert_parameters(config.model) // config.parallel.expert_tensor
        index = len(indexed.intersection(layers)) * index_of_rank(config)
        dense = (len(layers) - mixtures) * layer_parameters(config) + mixtures * layer_parameters(config, experts=True)
        parameters = dense + index + experts + _edge_parameters(config, vocab_size, first, last)
        stages.append(
            Stage(
                number=number,
                first=first,
                last=last,
                layers=layers,
                parameters=parameters,
                in_flight=_in_flight(config, number, microbatches),
                experts=experts,
                trained=index if frozen else parameters - index * still,
                trained_experts=0 if frozen else experts,
            )
        )
    return stages


def whole_model(config: Config, vocab_size: int) -> Stage:
    """The whole model, as if one rank held it."""
    (stage,) = stages_of(config.model_copy(update={"parallel": ParallelConfig()}), vocab_size, 1)
    return stage


def whole_parameters(config: Config, vocab_size: int) -> int:
    """Parameters of the whole model."""
    return whole_model(config, vocab_size).parameters


def indexed_layers(config: Config) -> frozenset[int]:
    """Layers, counted from 1, that have an index of their own: those that are MoBA in some stage of the training."""
    if config.attention.router == "own":
        return frozenset()
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    return frozenset(n for n in range(1, config.model.num_layers + 1) if not schedule.always_full(n))


def repeated_layers(config: Config) -> frozenset[int]:
    """Layers, counted from 1 over the whole model, that the backward pass computes again as a whole."""
    if config.training.recompute != "full":
        return frozenset()
    of_chunk, start, found = config.training.recompute_layers, 1, set()
    for count in config.chunk_layers:
        found.update(range(start, start + min(count, of_chunk or count)))
        start += count
    return frozenset(found)


def config_of_layers(config: Config, repeated: bool) -> Config:
    """The configuration as the layers have it that are, or are not, among `repeated_layers`."""
    training = config.training
    if training.recompute_layers is None:
        return config
    update = {"recompute": "full" if repeated else "none", "recompute_layers": None}
    return config.model_copy(update={"training": training.model_copy(update=update)})


def tokens_of_rank(config: Config) -> int:
    """Tokens of one microbatch on one context-parallel rank."""
    return -(-config.data.sequence_length * config.training.micro_batch_size // config.parallel.context)


def layer_parameters(config: Config, experts: bool = False) -> int:
    """Parameters of one layer on one tensor-parallel rank, without an index that chooses blocks.

    Args:
        experts: whether it is a mixture; its experts, which are split over other ranks, are not counted.
    """
    model, tensor = config.model, config.parallel.tensor
    hidden, size, heads, kv_heads = model.hidden_size, model.head_size, model.num_attention_heads, model.query_groups
    joint = (heads + 2 * kv_heads) * size
    split = joint * hidden + heads * size * hidden + joint * model.add_qkv_bias
    split += kv_heads * size * (config.attention.key_convolution or 0)
    whole = 2 * hidden + 2 * size * model.qk_layernorm
    return split // tensor + whole + feed_forward_parameters(config, experts)


def index_of_rank(config: Config) -> int:
    """Parameters of a layer's index that chooses blocks, on one tensor-parallel rank; 0 without."""
    attention, model = config.attention, config.model
    size, hidden = attention.router_dim, model.hidden_size
    if attention.router == "own" or size is None:
        return 0
    queries = model.query_groups if attention.router_heads == "key" else model.num_attention_heads
    keys = model.query_groups if attention.router_keys == "key" else 0
    shared = size * hidden * (attention.router_keys == "shared")
    split = (queries + keys) * size * hidden
    return split // config.parallel.tensor + shared + 2 * size * (attention.router_norm == "rms")


def feed_forward_parameters(config: Config, experts: bool = False) -> int:
    """Those of its feed-forward: of a mixture the shared expert, and the router, which every rank has whole."""
    model = config.model
    ffn = (model.moe_shared_expert_intermediate_size or 0) if experts else model.ffn_size
    return 3 * model.hidden_size * ffn // config.parallel.tensor + (router_parameters(model) if experts else 0)


def experts_of_rank(config: Config) -> int:
    """Experts of one layer on one rank."""
    return (config.model.num_moe_experts or 0) // config.parallel.expert


def expert_replicas(config: Config, data_parallel: int) -> int:
    """Ranks that hold the same part of the same experts: the expert-data-parallel size."""
    parallel = config.parallel
    ranks = data_parallel * parallel.context * parallel.tensor
    return max(1, ranks // (parallel.expert * parallel.expert_tensor))


def vocabulary_rows(config: Config, vocab_size: int) -> int:
    """Rows of the embedding and of the output layer on one tensor-parallel rank."""
    return -(-vocab_size // config.parallel.tensor)


def _edge_parameters(config: Config, vocab_size: int, first: bool, last: bool) -> int:
    """Embedding, output layer and final norm on one tensor-parallel rank of a stage."""
    rows = vocabulary_rows(config, vocab_size) * config.model.hidden_size
    tied_here = config.model.share_embeddings_and_output_weights and first
    tables = first + (last and not tied_here)
    return tables * rows + last * config.model.hidden_size


def _layer_numbers(config: Config) -> list[tuple[int, ...]]:
    """Numbers of the layers of each stage, over its chunks."""
    stages, chunks, start = config.parallel.pipeline, [], 1
    for count in config.chunk_layers:
        chunks.append(range(start, start + count))
        start += count
    return [tuple(n for chunk in chunks[stage::stages] for n in chunk) for stage in range(stages)]


def _in_flight(config: Config, stage: int, microbatches: int) -> float:
    """Stage i of p holds p - i microbatches under 1F1B. Interleaved over v chunks it runs 2 (p - i - 1) + (v - 1) p
    chunks ahead (arXiv 2104.04473), and holds one more."""
    stages, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline
    if virtual is None:
        return min(stages - stage, microbatches)
    ahead = 2 * (stages - stage - 1) + (virtual - 1) * stages + 1
    return min(ahead, microbatches * virtual) / virtual
