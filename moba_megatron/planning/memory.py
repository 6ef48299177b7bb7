"""Memory of one rank, from sizes alone. An estimate: the allocator's slack and communication buffers are not in it.

Weights and optimizer (bytes a parameter of this rank): bf16 weights 2, or fp32 weights that are their own main copy;
fp32 gradients 4; with bf16 weights fp32 main weights 4; Adam's two moments 8. The distributed optimizer splits main
weights and moments over the data-parallel and context-parallel ranks, which hold the same weights.

Activations of one layer, s tokens, hidden h, in the training dtype of a bytes (after arXiv 2205.05198, with SwiGLU,
fused attention and no dropout): two norm inputs and two norm outputs 4 s h, query, key, value and the attention's
output s D (2 N + 2 G), the feed-forward's gate, up and product 3 s f. Tensor parallelism splits heads and the
feed-forward, sequence parallelism the rest, context parallelism the tokens. Full recomputation keeps s h a layer and
one whole layer at a time. Stage i of p pipeline stages holds p - i microbatches at once, the first one p.
"""

from __future__ import annotations

from dataclasses import dataclass

from moba_megatron.config import Config


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def estimate_memory(config: Config, parameters: int, vocab_size: int, data_parallel: int) -> MemoryEstimate:
    """Estimate from the whole model's parameter count, which is taken to spread over pipeline stages as layers do."""
    parallel, training = config.parallel, config.training
    width = 2 if training.precision == "bf16" else 4
    local = parameters * max(_stage_layers(config)) // (config.model.num_layers * parallel.tensor)
    per_parameter = 12 if training.precision == "bf16" else 8
    replicas = data_parallel * parallel.context
    optimizer = local * per_parameter // (replicas if parallel.distributed_optimizer else 1)
    return MemoryEstimate(
        weights=local * width,
        gradients=local * 4,
        optimizer=optimizer,
        activations=_activations(config, width),
        loss=min(training.loss_chunk_size, _tokens(config)) * vocab_size // parallel.tensor * 4 * 2,
    )


def _tokens(config: Config) -> int:
    """Tokens of one microbatch on one rank."""
    return config.data.sequence_length * config.training.micro_batch_size // config.parallel.context


def _stage_layers(config: Config) -> list[int]:
    """Layers of each pipeline stage, over its chunks."""
    stages = config.parallel.pipeline
    return [sum(config.chunk_layers[stage::stages]) for stage in range(stages)]


def _activations(config: Config, width: int) -> int:
    model, parallel = config.model, config.parallel
    tokens = _tokens(config)
    shared = 4 * model.hidden_size // (parallel.tensor if parallel.sequence else 1)
    heads = model.head_size * (2 * model.num_attention_heads + 2 * model.query_groups)
    layer = tokens * width * (shared + (heads + 3 * model.ffn_size) // parallel.tensor)
    held = max(count * (parallel.pipeline - stage) for stage, count in enumerate(_stage_layers(config)))
    if config.training.recompute == "full":
        return layer + held * tokens * width * model.hidden_size
    return held * layer
