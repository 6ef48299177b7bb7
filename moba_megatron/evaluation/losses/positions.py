"""Validation loss by position in the document, which shows what an average hides: whether the far end of the window
learns.

*Position* is the number of tokens a prediction can look back on within its document (the batch's `position_ids`).
*Trailing loss* is the mean over the last positions of the window (MoBA report, section 3.1: the last 2K of 32K), of
the documents that fill it alone: one that ends a few tokens before does not count.

Everything here follows from one table of sums, fp64 `[4, S]`: summed loss and number of tokens at each position, and
the same two of the documents that fill the window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state

from moba_megatron.config import Config
from moba_megatron.model.forward import Batch, forward_only, microbatch_shape, reduce_over_ranks

# The first of the ranges that double: below it there is little text to average over.
FIRST_RANGE = 16


@dataclass
class PositionRange:
    """Mean loss (nats per token) over the predictions at positions start to end (exclusive); None where there were
    none."""

    start: int
    end: int
    tokens: int
    loss: float | None


@dataclass
class Evaluation:
    """Losses in nats per token over `evaluated_tokens` predictions; trailing loss over the last `trailing_tokens`
    positions of documents that fill the window; losses by position over equal ranges, and over ranges that double
    (`by_position_log`)."""

    loss: float
    trailing_loss: float | None
    trailing_tokens: int
    evaluated_tokens: int
    by_position: list[PositionRange]
    by_position_log: list[PositionRange]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: list[torch.nn.Module], batches: list[Iterator[Batch]], config: Config, num_microbatches: int
) -> Evaluation:
    """Run the model over validation batches and sum up, as the configuration says. Arguments as for `position_totals`.
    Collective; every rank gets the same result."""
    sums_4S = position_totals(model, batches, config, num_microbatches)
    return summarise(sums_4S, config.trailing_tokens, config.evaluation.position_buckets)


def position_totals(
    model: list[torch.nn.Module], batches: list[Iterator[Batch]], config: Config, num_microbatches: int
) -> torch.Tensor:
    """Summed losses and numbers of tokens by position, `[4, S]`, over all ranks. Collective.

    Args:
        model, batches, num_microbatches: as for `forward_only`.
    """
    length = config.data.sequence_length
    reduction = partial(position_sums, length=length, padded_rows=config.data.packing != "concatenate")
    shape = microbatch_shape(config.data, config.training.micro_batch_size)
    reductions = forward_only(model, batches, num_microbatches, shape, reduction)
    return reduce_over_ranks([item["sums"] for item in reductions], (4, length))


def position_sums(
    losses_BS: torch.Tensor, batch: Batch, length: int, padded_rows: bool = False
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and token counts added up by position: `sums` is fp64 `[4, length]`. Collective over context-parallel
    ranks where rows may be padded.

    The padding of a document may lie beyond `length`; its mask is 0, so where it is counted makes no difference.

    Args:
        padded_rows: whether a row that is not packed may end in padding.
    """
    losses, mask = losses_BS.double().flatten(), batch["loss_mask"].double().flatten()
    position = batch["position_ids"].flatten().clamp(max=length - 1)
    sums_4S = torch.zeros(4, length, dtype=torch.float64, device=losses_BS.device)
    for first, counted in ((0, mask), (2, mask * _fills_window(batch, length, padded_rows))):
        sums_4S[first].index_add_(0, position, losses * counted)
        sums_4S[first + 1].index_add_(0, position, counted)
    return sums_4S[0].sum(), mask.sum().int(), {"sums": sums_4S}


def _fills_window(batch: Batch, length: int, padded_rows: bool) -> torch.Tensor:
    """bool [tokens here]: whether the document of a token has the whole length of the window."""
    packed, mask_BS = batch.get("packed_seq_params"), batch["loss_mask"]
    if packed is None:
        fills_B = torch.ones(mask_BS.size(0), dtype=torch.int32, device=mask_BS.device)
        if padded_rows:
            # A row without padding counts at its end; its last token may have no label.
            at_end = (batch["position_ids"] >= length - 2) & (mask_BS > 0)
            fills_B = at_end.any(dim=1).int()
            if parallel_state.get_context_parallel_world_size() > 1:
                group = parallel_state.get_context_parallel_group()
                torch.distributed.all_reduce(fills_B, torch.distributed.ReduceOp.MAX, group=group)
        return fills_B.bool().repeat_interleave(mask_BS.size(1))
    padded = packed.cu_seqlens_q_padded
    bounds = (packed.cu_seqlens_q if padded is None else padded).long()
    # A context-parallel rank holds an equal share of every document, in their order.
    ends_here = bounds[1:] * mask_BS.numel() // bounds[-1]
    document = torch.searchsorted(ends_here, torch.arange(mask_BS.numel(), device=mask_BS.device), right=True)
    return packed.cu_seqlens_q.diff()[document] >= length


def summarise(sums_4S: torch.Tensor, trailing_tokens: int, buckets: int) -> Evaluation:
    """Means from sums by position: over all, over the trailing positions of documents that fill the window, and over
    ranges of positions."""
    sums_2S, full_2S = sums_4S[:2], sums_4S[2:]
    length = sums_2S.size(1)
    loss, tokens = _mean(sums_2S)
    if loss is None:
        raise ValueError("no token of the evaluation counts: its loss mask is empty")
    trailing, _ = _mean(full_2S[:, length - trailing_tokens :])
    return Evaluation(
        loss=loss,
        trailing_loss=trailing,
        trailing_tokens=trailing_tokens,
        evaluated_tokens=tokens,
        by_position=range_losses(sums_2S, [length * i // buckets for i in range(buckets + 1)]),
        by_position_log=range_losses(sums_2S, doubling_bounds(length)),
    )


def range_losses(sums_2S: torch.Tensor, bounds: list[int]) -> list[PositionRange]:
    """Mean losses between neighbouring bounds, which rise and lie within the table."""
    ranges = []
    for start, end in pairwise(bounds):
        loss, tokens = _mean(sums_2S[:, start:end])
        ranges.append(PositionRange(start, end, tokens, loss))
    return ranges


def doubling_bounds(length: int, first: int = FIRST_RANGE, per_octave: int = 1) -> list[int]:
    """Bounds from 0 to `length`: the first range ends at `first`, every `per_octave`-th one after it at twice as much.

    >>> doubling_bounds(100)
    [0, 16, 32, 64, 100]
    >>> doubling_bounds(64, per_octave=2)
    [0, 16, 23, 32, 45, 64]
    """
    bounds, power = [0], 0
    while (bound := round(first * 2 ** (power / per_octave))) < length:
        bounds.append(bound)
        power += 1
    return [*bounds, length]


def _mean(sums_2S: torch.Tensor) -> tuple[float | None, int]:
    total, count = sums_2S.sum(dim=1).tolist()
    return (total / count if count else None), int(count)
