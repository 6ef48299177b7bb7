"""One microbatch through the model, in the form that megatron-core's pipeline schedules call.

A batch is a dict of tensors `tokens`, `labels`, `position_ids` (int64 `[b, s]`) and `loss_mask` (fp32 `[b, s]`); a
packed batch has b = 1 and a `packed_seq_params` entry with its document boundaries; `padding_mask` (bool `[b, s]`) is
True where a token is padding, and may be missing where none is. Under context parallelism s counts
this rank's tokens; sums are over data-parallel and context-parallel ranks alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from moba_megatron.config import DataConfig
from moba_megatron.model.index_inputs import learns_blocks, with_loss_mask
from moba_megatron.platform import current_device

Batch = dict[str, Any]
Reduction = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


def token_sums(losses_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Summed loss over the tokens that count, their number, and both once more for the records.

    With `calculate_per_token_loss`, megatron-core divides by the number of tokens of the whole global batch, so the
    loss is a mean over tokens, not a mean of means.
    """
    mask_BS = batch["loss_mask"]
    total = (losses_BS.float() * mask_BS).sum()
    count = mask_BS.sum()
    return total, count.to(torch.int), {"sums": torch.stack([total.detach(), count])}


def forward_step(
    batches: Iterator[Batch], model: torch.nn.Module, reduction: Reduction = token_sums
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Take the next batch through one model chunk.

    Returns:
        The chunk's output (per-token losses `[b, s]` on the last stage, hidden states elsewhere) and the function that
        reduces it, as `get_forward_backward_func` wants them.
    """
    batch = next(batches)
    # Routers leave padding out of what they count; dense layers have no use for it.
    padding = {"padding_mask": batch.get("padding_mask")} if model.config.num_moe_experts else {}
    packed = batch.get("packed_seq_params")
    if learns_blocks(model.config) and torch.is_grad_enabled():
        packed = with_loss_mask(packed, batch["loss_mask"])
    output = model(
        batch["tokens"],
        batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        packed_seq_params=packed,
        **padding,
    )
    return output, partial(_reduce, reduction, batch)


@torch.no_grad()
def forward_only(
    model: list[torch.nn.Module],
    batches: list[Iterator[Batch]],
    num_microbatches: int,
    shape: dict[str, int],
    reduction: Reduction,
) -> list[dict[str, torch.Tensor]]:
    """Batches through the model without gradients, at any parallel layout, as training runs them. Collective.

    Args:
        model: this pipeline rank's chunks, wrapped for data parallelism or not; left in training mode if they were.
        batches: one iterator of this rank's batches for each chunk.
        num_microbatches: how many batches to take from each.
        shape: see `microbatch_shape`.

    Returns:
        What the reduction returned last of each, on the last pipeline stage; an empty list elsewhere.
    """
    was_training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    reductions = get_forward_backward_func()(
        forward_step_func=partial(forward_step, reduction=reduction),
        data_iterator=batches if len(batches) > 1 else batches[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=num_microbatches,
        **shape,
        forward_only=True,
    )
    for chunk, training in zip(model, was_training, strict=True):
        chunk.train(training)
    return reductions


def microbatch_shape(data: DataConfig, micro_batch_size: int) -> dict[str, int]:
    """Arguments that tell the pipeline schedules the shape `[s, b, h]` of the hidden states between stages.

    For the whole sequence: megatron-core divides by the context-parallel and tensor-parallel sizes itself. Where packs
    are padded for context parallelism they differ in length, and the schedules ask each time (`variable_seq_lengths`).
    """
    if data.cross_document_attention:
        return {"seq_length": data.sequence_length, "micro_batch_size": micro_batch_size}
    return {"seq_length": data.sequence_length * micro_batch_size, "micro_batch_size": 1}


def reduce_over_ranks(sums: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Add up the results of the microbatches of all data-parallel ranks. Collective.

    Args:
        sums: one tensor a microbatch on the last pipeline stage, empty elsewhere.
        shape: the shape of each.

    Returns:
        The fp64 total, the same on every rank.
    """
    total = torch.zeros(shape, dtype=torch.float64, device=current_device())
    for tensor in sums:
        total += tensor
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(total, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return total


def _reduce(reduction: Reduction, batch: Batch, output: torch.Tensor) -> Any:
    return reduction(output, batch)
