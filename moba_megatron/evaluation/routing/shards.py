"""From a context-parallel rank's tokens to all tokens of some heads, for the routing report.

Every number of the report belongs to one head and needs all keys of that head. So the ranks that share a sequence trade
tokens for heads: each gets all tokens of its share of the heads, and no rank holds more than its part of the whole. A
share is whole key heads with their query heads. If there are fewer key heads than ranks, it is single query heads with
a copy of their key head. The padding of context parallelism is removed.

Legend: C ranks, t tokens of a rank, T tokens of the pack without padding, H heads, D head size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from moba_megatron.evaluation.routing.capture import Captured
from moba_megatron.model.forward import Batch
from moba_megatron.ops import Router
from moba_megatron.parallel.layout import shard_positions


class Shards:
    """Where the tokens of one batch lie over the context-parallel ranks. Its methods are collective over these.

    Args:
        batch: this rank's part of one sequence or one pack.
    """

    def __init__(self, batch: Batch):
        self.group = parallel_state.get_context_parallel_group()
        self.size, self.rank = self.group.size(), self.group.rank()
        packed = batch["packed_seq_params"]
        if packed is None:
            self.cu_seqlens = None
            padded = torch.tensor([0, batch["tokens"].numel() * self.size])
        else:
            self.cu_seqlens, padded = packed.cu_seqlens_q, packed.cu_seqlens_q_padded.cpu().long()
        positions = torch.cat([shard_positions(padded, self.size, rank) for rank in range(self.size)])
        row_T = positions.argsort()
        if packed is not None:
            at = torch.arange(int(padded[-1]))
            document = torch.searchsorted(padded[1:], at, right=True)
            row_T = row_T[at - padded[document] < self.cu_seqlens.cpu().long().diff()[document]]
        self.row_T = row_T.to(batch["tokens"].device)

    def whole_batch(self, batch: Batch) -> Batch:
        """Loss mask [1, T] and documents of the whole batch."""
        local_t = batch["loss_mask"].flatten().contiguous()
        parts = [torch.empty_like(local_t) for _ in range(self.size)]
        dist.all_gather(parts, local_t, group=self.group)
        packed = None
        if self.cu_seqlens is not None:
            packed = PackedSeqParams(cu_seqlens_q=self.cu_seqlens, cu_seqlens_kv=self.cu_seqlens)
        return {"loss_mask": torch.cat(parts)[self.row_T][None], "packed_seq_params": packed}

    def heads_of(self, seen: Captured, together: bool) -> Captured | None:
        """All tokens of this rank's share of the heads; None where there are fewer heads than ranks and none is its.

        Args:
            together: whether the query heads of a key head choose together, and so have to be on one rank.
        """
        heads, kv_heads, k, index = seen.q.shape[1], seen.k.shape[1], seen.k, seen.index
        attention = seen.attention
        if index is not None:
            together = together or index.q.shape[1] < heads
            index = replace(index, k=index.k.repeat_interleave(kv_heads // index.k.shape[1], dim=1))
        if self.size > kv_heads and not together:
            each = heads // kv_heads
            attention = attention.repeated(each)
            k, kv_heads = k.repeat_interleave(each, dim=1), heads
            index = None if index is None else replace(index, k=index.k.repeat_interleave(each, dim=1))
        bounds = [kv_heads * rank // self.size for rank in range(self.size + 1)]
        each = heads // kv_heads
        q, k = self._trade(seen.q, [bound * each for bound in bounds]), self._trade(k, bounds)
        if index is not None:
            index_each = index.q.shape[1] // kv_heads
            index_q = self._trade(index.q, [bound * index_each for bound in bounds])
            index = Router(index_q, self._trade(index.k, bounds))
        if q.shape[1] == 0:
            return None
        first = seen.first_head + bounds[self.rank] * each
        attention = attention.of_heads(bounds[self.rank], k.shape[1])
        of_rank = {"q": q, "k": k, "cu_seqlens": self.cu_seqlens, "first_head": first, "index": index}
        return replace(seen, attention=attention, **of_rank)

    def _trade(self, x_tHD: Tensor, bounds: list[int]) -> Tensor:
        """[T, this rank's heads, D]; rank r gets the heads from bounds[r] to bounds[r + 1]."""
        tokens, _, width = x_tHD.shape
        counts = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
        sent_HtD = x_tHD.transpose(0, 1).contiguous()
        mine = counts[self.rank]
        received = x_tHD.new_empty(self.size * mine * tokens * width)
        sizes = [count * tokens * width for count in counts]
        dist.all_to_all_single(
            received, sent_HtD.flatten(), [mine * tokens * width] * self.size, sizes, group=self.group
        )
        return received.view(self.size, mine, tokens, width).transpose(1, 2).flatten(0, 1)[self.row_T]
