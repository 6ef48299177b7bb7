"""Microbatches of a data-parallel rank, with document boundaries.

Which samples a rank gets follows megatron-core's pretraining sampler: a pass of all D ranks takes the next
`micro_batch_size` x D samples in order, rank r the r-th run of `micro_batch_size` of them. The order of samples is thus
the same for any D, and a run that has consumed n samples continues with sample n at any D. A last pass that the samples
do not fill is filled with samples whose loss mask is 0: no sample is lost or counts twice, and all ranks make the same
number of passes.

If documents do not see each other, the samples of a microbatch are packed into one row, `[1, b * s]`, with
`cu_seqlens`: a document ends where its sample's `cu_seqlens` say so, and at the end of each sample. If a sample of
another kind of dataset has no `cu_seqlens`, a document ends after each end-of-document token. The dense mask over pairs
of tokens never exists. Positions start at 0 in each document.

Under context parallelism a rank keeps its part of each batch (`context_part`): two chunks of every document, or of
every row where a row is one sequence. Documents are padded at their end to a length that can be cut. Padding is not in
the loss, and attention is causal, so no true token ever sees it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from moba_megatron.ops.kept_layouts import stays_as_it_is
from moba_megatron.parallel.context_plan import remember_boundaries
from moba_megatron.parallel.layout import padded_boundaries, shard_positions

Batch = dict[str, Any]
"""`tokens`, `labels`, `position_ids` [b, s] int64 and `loss_mask` [b, s] fp32; packed: [1, b * s], and `cu_seqlens`
[documents + 1] int32, `max_seqlen` int. The part of a context-parallel rank of a pack besides has `cu_seqlens_padded`
[documents + 1] int32. Where there may be padding `padding_mask` [b, s] bool is True for it."""

_ROWS = ("tokens", "labels", "loss_mask", "position_ids")
_PADDING = "padding_mask"


def microbatches(
    dataset: Any,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    device: torch.device | str,
    eod_id: int | None,
    num_samples: int | None = None,
    context_rank: int = 0,
    context_size: int = 1,
    tokens_multiple: int = 1,
) -> Iterator[Batch]:
    """The microbatches of one rank, from sample `consumed_samples` on.

    Args:
        dataset: as `build_datasets` makes it.
        consumed_samples: samples that all ranks together have had.
        micro_batch_size: samples per microbatch (b).
        data_parallel_rank, data_parallel_size: place among the ranks that see different samples.
        device: where the tensors go.
        eod_id: the end-of-document id, to pack documents and to pad with; None where documents see each other.
        num_samples: stop after this sample of the dataset. Default: its length.
        context_rank, context_size: place among the ranks that share each sample.
        tokens_multiple: as for `context_part`.

    Raises:
        ValueError: a rank out of range, more samples asked for than there are, or rows that cannot be cut.
    """
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ValueError(
            f"data_parallel_rank {data_parallel_rank} is not within data_parallel_size {data_parallel_size}"
        )
    total = len(dataset) if num_samples is None else num_samples
    if not 0 <= consumed_samples <= total <= len(dataset):
        raise ValueError(f"samples {consumed_samples} to {total} are not within the {len(dataset)} of the dataset")
    numbers = rank_samples(consumed_samples, total, micro_batch_size, data_parallel_rank, data_parallel_size)
    for rows in numbers:
        # A filler is the first sample again, for its shape only.
        samples = [dataset[0 if row is None else row] for row in rows]
        batch: Batch = {name: torch.stack([sample[name] for sample in samples]) for name in _ROWS}
        if _PADDING in samples[0]:
            batch[_PADDING] = torch.stack([sample[_PADDING] for sample in samples])
        batch["loss_mask"][[number for number, row in enumerate(rows) if row is None]] = 0.0
        if eod_id is not None:
            batch = pack(batch, eod_id, [sample.get("cu_seqlens") for sample in samples])
        if context_size > 1:
            batch = context_part(batch, context_rank, context_size, tokens_multiple=tokens_multiple, pad_id=eod_id or 0)
        yield _on_device(batch, torch.device(device))


def rank_samples(
    consumed_samples: int, num_samples: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[list[int | None]]:
    """Sample numbers of each microbatch of a rank; None is a filler.

    >>> list(rank_samples(4, 9, micro_batch_size=2, data_parallel_rank=1, data_parallel_size=2))
    [[6, 7], [None, None]]
    """
    for start in range(consumed_samples, num_samples, micro_batch_size * data_parallel_size):
        first = start + data_parallel_rank * micro_batch_size
        yield [number if number < num_samples else None for number in range(first, first + micro_batch_size)]


def pack(batch: Batch, eod_id: int, boundaries: list[Tensor | None] | None = None) -> Batch:
    """Join the rows [b, s] of a batch into one of documents, [1, b * s].

    Args:
        boundaries: of the documents of each row, from 0 to s; None: they end after each `eod_id`.

    >>> batch = {"tokens": torch.tensor([[5, 0, 6], [7, 8, 0]])}
    >>> packed = pack(batch, eod_id=0)
    >>> packed["cu_seqlens"].tolist(), packed["max_seqlen"], packed["position_ids"].tolist()
    ([0, 2, 3, 6], 3, [[0, 1, 0, 0, 1, 2]])
    """
    tokens: Tensor = batch["tokens"]
    ends = tokens == eod_id
    for row, given in enumerate(boundaries or []):
        if given is not None:
            ends[row] = False
            ends[row, given[1:].long() - 1] = True
    ends[:, -1] = True
    after = torch.nonzero(ends.flatten()).flatten() + 1
    cu_seqlens = torch.cat([after.new_zeros(1), after])
    lengths = cu_seqlens.diff()
    packed = {name: value.reshape(1, -1) for name, value in batch.items()}
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths)
    packed["position_ids"] = (torch.arange(tokens.numel(), device=tokens.device) - starts).unsqueeze(0)
    return {**packed, "cu_seqlens": cu_seqlens.to(torch.int32), "max_seqlen": int(lengths.max())}


def context_part(
    batch: Batch, context_rank: int, context_size: int, *, tokens_multiple: int = 1, pad_id: int = 0
) -> Batch:
    """A context-parallel rank's part of a batch: [b, s / C], or [1, t] of a pack, in zigzag layout (`parallel.layout`).

    Args:
        batch: the whole batch, the same on all ranks of the group.
        tokens_multiple: the tokens of a rank must be a multiple of this: the tensor-parallel size under sequence
            parallelism. The last document of a pack is padded further for it.
        pad_id: token id of padding. Its label and its loss mask are 0, its positions go on from its document's.

    Returns:
        The part; of a pack with the true `cu_seqlens` of the whole pack, `cu_seqlens_padded`, and `max_seqlen` of the
        padded documents.

    Raises:
        ValueError: rows of an unpacked batch whose length is not a multiple of 2 C.

    >>> batch = pack({"tokens": torch.tensor([[5, 6, 0, 7, 8, 9]])}, eod_id=0)
    >>> part = context_part(batch, 0, 2)
    >>> part["tokens"].tolist(), part["position_ids"].tolist(), part["cu_seqlens_padded"].tolist()
    ([[5, 0, 7, 0]], [[0, 3, 0, 3]], [0, 4, 8])
    """
    if "cu_seqlens" not in batch:
        row = torch.tensor([0, batch["tokens"].shape[1]], device=batch["tokens"].device)
        mine = shard_positions(row, context_size, context_rank)
        return {name: value.index_select(1, mine) for name, value in batch.items()}
    true = batch["cu_seqlens"]
    padded = padded_boundaries(true, context_size, total_multiple=tokens_multiple)
    mine = shard_positions(padded, context_size, context_rank)
    document = torch.searchsorted(padded[1:].to(mine), mine, right=True)
    position = mine - padded[document]
    is_padding = position >= true.diff()[document]
    source = (true[document] + position).masked_fill(is_padding, 0)
    part = dict(batch)
    for name in _ROWS:
        if name in batch:
            padding = pad_id if name == "tokens" else 0
            part[name] = batch[name].index_select(1, source).masked_fill(is_padding, padding)
    part["position_ids"] = position.unsqueeze(0)
    if _PADDING in batch:
        is_padding = is_padding | batch[_PADDING].flatten()[source]
    part[_PADDING] = is_padding.unsqueeze(0)
    return {**part, "cu_seqlens_padded": padded, "max_seqlen": int(padded.diff().max())}


def packed_seq_params(batch: Batch) -> PackedSeqParams | None:
    """The `PackedSeqParams` of a packed batch for megatron-core's layers; None for one that is not packed."""
    if "cu_seqlens" not in batch:
        return None
    cu_seqlens, longest = batch["cu_seqlens"], batch["max_seqlen"]
    padded = batch.get("cu_seqlens_padded")
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on its device, copied beside the computation. Context parallelism plans on the host, from the boundaries
    that were there."""
    moved = {name: _to(value, device) for name, value in batch.items()}
    padded = batch.get("cu_seqlens_padded")
    if padded is not None and device.type != "cpu":
        remember_boundaries(moved["cu_seqlens_padded"], tuple(padded.tolist()))
    if "cu_seqlens" in moved and device.type != "cpu":
        stays_as_it_is(moved["cu_seqlens"])
    return moved


def _to(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor) or device.type == "cpu":
        return value
    # From pinned memory, so that the host does not wait for the copy.
    return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)
