"""The forward and backward pass of a global batch, and what the model counted meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from moba_megatron.checkpoint import TrainingState
from moba_megatron.config import Config
from moba_megatron.model.block_router import read_index_tallies
from moba_megatron.model.experts import read_tallies
from moba_megatron.model.forward import Batch, forward_step, microbatch_shape, reduce_over_ranks
from moba_megatron.training.step_metrics import expert_metrics, index_metrics


@dataclass(frozen=True)
class BatchPass:
    """What a pass over a global batch gave besides its gradients.

    Attributes:
        sums: of the loss over tokens, and their number, of each microbatch of this rank; see `model.forward`.
        loss: mean over the tokens of the global batch.
        metrics: of what experts and indexes counted; nothing of a model that has neither.
    """

    sums: list[Tensor]
    loss: float
    metrics: dict[str, Any]


def compute_gradients(
    config: Config,
    state: TrainingState,
    chunks: list[DistributedDataParallel],
    batches: list[Iterator[Batch]],
    num_microbatches: int,
    device: torch.device,
) -> BatchPass:
    """Forward and backward pass of the next global batch: gradients, added up over the ranks. Collective.

    Args:
        batches: of microbatches, for each chunk.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    reductions = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches if len(batches) > 1 else batches[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        **microbatch_shape(config.data, config.training.micro_batch_size),
        forward_only=False,
    )
    sums = [item["sums"] for item in reductions]
    metrics = {
        **expert_counts(config, state.model, device),
        **_index_counts(config, state.model, device),
    }
    total, count = reduce_over_ranks(sums, (2,)).tolist()
    return BatchPass(sums, total / max(count, 1), metrics)


def expert_counts(config: Config, model: list[torch.nn.Module], device: torch.device) -> dict[str, Any]:
    """Metrics of what the routers of experts counted since this was called last; nothing of a dense model."""
    if config.model.num_moe_experts is None:
        return {}
    return expert_metrics(read_tallies(model, config.model, device).cpu(), config.model)


def _index_counts(config: Config, model: list[torch.nn.Module], device: torch.device) -> dict[str, Any]:
    """Metrics of what the indexes learnt from since this was called last; nothing of a model without any that
    learns."""
    attention = config.attention
    if attention.router == "own" or attention.router_loss == "none":
        return {}
    return index_metrics(read_index_tallies(model, config.model.num_layers, device).cpu(), attention)
