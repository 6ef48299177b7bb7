"""`dispatch`: queries travel to the ranks that own their chosen blocks, and partial outputs come back, as tokens travel
to experts and back.

A query row (one token, one head) goes once to each rank that owns keys it needs, with the numbers of the kv blocks it
attends there; its partial output and log-sum-exp come back and are combined at home. In the backward pass the row goes
again, with the gradient of the output and two numbers of the whole attention, and its partial dq comes back. Keys,
values and their gradients stay where they are, but for the blocks that everybody wants (`copies`). What a rank sends
depends on its own tokens and the number of chosen blocks, not on the length of the sequence.

Rows are sorted by kv head, then token, then head, and arrive in the order of ranks: nothing is added in an order left
open. The numbers of rows depend on the choices, so in the forward pass the host waits for the device twice: for what
all ranks ask of each block, and for the numbers of rows that leave and come. The backward pass uses them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.combine import combine_weights
from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.upload import upload
from moba_megatron.parallel.context_plan import ContextPlan
from moba_megatron.parallel.copies import Copies, choose_copies, demanded
from moba_megatron.parallel.exchange import PartialAttention, Queries
from moba_megatron.parallel.exchange_kind import ExchangeKind, Levels, Message, RankSizes, wide_output
from moba_megatron.parallel.wire import Wire, report_load


@dataclass(frozen=True)
class _Numbers:
    """What the host knows of the rows that travel.

    Attributes:
        hot_M: bool [M], blocks that are copied instead; hot_on_device_M: the same where the queries are.
        leaving, coming: for and from each rank, the rows of each kv head [C][G].
        leaving_widths, coming_widths: the most kv blocks of a row, for and from each rank.
    """

    hot_M: Tensor
    hot_on_device_M: Tensor
    leaving: list[list[int]]
    coming: list[list[int]]
    leaving_widths: list[int]
    coming_widths: list[int]


@dataclass(frozen=True)
class _Journey:
    """Which rows of this rank go where, and which of other ranks come here.

    Attributes:
        rows: int64, this rank's query rows (token * N + head) for all ranks one after the other.
        leaving, coming: rows for and from each rank.
        slots: for each rank int64 [rows, w]: to which of a row's slots the kv blocks that it names there belong.
        kv_blocks: int32 [guests, w], this rank's kv blocks that each guest attends, -1 for none.
        order: int64 [guests], guests sorted by kv head.
        of_kv_head: guests of each kv head.
    """

    rows: Tensor
    leaving: list[int]
    coming: list[int]
    slots: list[Tensor]
    kv_blocks: Tensor
    order: Tensor
    of_kv_head: list[int]


class Dispatch:
    """See the module."""

    def __init__(self, wire: Wire):
        self.wire = wire
        self._numbers: _Numbers | None = None

    def forward(
        self, plan: ContextPlan, queries: Queries, k: Tensor, v: Tensor, ids: Tensor
    ) -> Iterator[PartialAttention]:
        """See `Exchange`."""
        qheads_per_kvhead = queries.q.shape[1] // k.shape[1]
        hot_M, load = self._choose_copies(plan, ids, k.shape[1])
        copies = Copies(plan, self.wire, hot_M, k, v)
        self._numbers = self._count(plan, ids, hot_M, k.shape[1])
        journey = self._travel(plan, ids, self._numbers)
        report_load(dataclasses.replace(load, guests=sum(journey.coming)))
        coming_q = self._send(journey, queries.q)
        yield PartialAttention(queries, Keys(k, v, qheads_per_kvhead), ids, plan.own_choices)
        q_RD = coming_q.wait()[journey.order]
        guests = Queries(
            q=q_RD.unsqueeze(1),
            out=torch.zeros_like(q_RD, dtype=queries.lse.dtype).unsqueeze(1),
            lse=queries.lse.new_full((q_RD.shape[0], 1), -torch.inf),
        )
        if queries.block_lse is not None:
            guests.block_lse = guests.lse.new_full((q_RD.shape[0], 1, journey.kv_blocks.shape[1]), -torch.inf)
        for _, partial in self._guest_partials(plan, journey, guests, k, v):
            yield partial
        home = [self._return(journey, x) for x in (guests.out.squeeze(1).to(k.dtype), guests.lse.squeeze(1))]
        of_blocks = None if guests.block_lse is None else self._return_blocks(journey, guests.block_lse.squeeze(1))
        yield from copies.partials(queries, ids, qheads_per_kvhead)
        partials = (pending.wait().split(journey.leaving) for pending in home)
        for rows, partial_out, partial_lse in zip(journey.rows.split(journey.leaving), *partials, strict=True):
            _combine_rows(queries, rows, partial_out, partial_lse)
        if of_blocks is not None:
            _combine_blocks(queries.block_lse, journey, of_blocks.wait())

    def backward(
        self, plan: ContextPlan, queries: Queries, k: Tensor, v: Tensor, ids: Tensor, dkv: Tensor
    ) -> Iterator[PartialAttention]:
        """See `Exchange`."""
        qheads_per_kvhead = queries.q.shape[1] // k.shape[1]
        assert self._numbers is not None, "the forward pass comes first"
        copies = Copies(plan, self.wire, self._numbers.hot_M, k, v)
        journey = self._travel(plan, ids, self._numbers)
        coming_rows = self._send(journey, torch.stack([queries.q, queries.do], dim=2))
        coming_numbers = self._send(journey, torch.stack([queries.lse, queries.delta], dim=2))
        yield PartialAttention(queries, Keys(k, v, qheads_per_kvhead), ids, plan.fragment(plan.rank), dkv[0], dkv[1])
        rows, numbers = coming_rows.wait()[journey.order], coming_numbers.wait()[journey.order]
        guests = Queries(
            q=rows[:, 0].unsqueeze(1).contiguous(),
            do=rows[:, 1].unsqueeze(1).contiguous(),
            lse=numbers[:, 0].unsqueeze(1).contiguous(),
            delta=numbers[:, 1].unsqueeze(1).contiguous(),
            dq=torch.zeros_like(rows[:, 0], dtype=numbers.dtype).unsqueeze(1),
        )
        for kv_head, partial in self._guest_partials(plan, journey, guests, k, v):
            partial_dkv = torch.zeros_like(dkv[:, :, :1])
            partial.dk, partial.dv = partial_dkv[0], partial_dkv[1]
            yield partial
            dkv[:, :, kv_head : kv_head + 1] += partial_dkv
        home = self._return(journey, guests.dq.squeeze(1).to(k.dtype))
        partial_dkv = copies.partial_dkv(k)
        yield from copies.partials(queries, ids, qheads_per_kvhead, partial_dkv)
        copies.bring_home(partial_dkv, dkv)
        dq, partials = queries.dq.flatten(0, 1), home.wait().split(journey.leaving)
        for rows, partial_dq in zip(journey.rows.split(journey.leaving), partials, strict=True):
            dq[rows] += partial_dq

    def _choose_copies(self, plan: ContextPlan, ids: Tensor, num_kv_heads: int):
        demand_M = self.wire.all_reduce(demanded(plan, ids), "plan").wait()
        return choose_copies(plan, self.wire.read(demand_M), num_kv_heads)

    def _count(self, plan: ContextPlan, ids: Tensor, hot_M: Tensor, num_kv_heads: int) -> _Numbers:
        """Tell the ranks how many rows come, and read all numbers at once."""
        # For each rank: rows of each kv head, and the most kv blocks of a row.
        leaving_CG1 = torch.zeros(plan.size, num_kv_heads + 1, dtype=torch.int64, device=ids.device)
        hot_on_device_M = upload(hot_M, ids.device)
        for rank, chosen_TNK in _chosen_elsewhere(plan, ids, hot_on_device_M):
            number_TN = (chosen_TNK >= 0).sum(dim=-1)
            leaving_CG1[rank, :-1] = (number_TN > 0).unflatten(1, (num_kv_heads, -1)).sum(dim=(0, 2))
            leaving_CG1[rank, -1] = number_TN.amax()
        coming_CG1 = self.wire.all_to_all(leaving_CG1, "plan").wait()
        leaving, coming = self.wire.read(torch.stack([leaving_CG1, coming_CG1])).tolist()
        return _Numbers(
            hot_M,
            hot_on_device_M,
            leaving=[numbers[:-1] for numbers in leaving],
            coming=[numbers[:-1] for numbers in coming],
            leaving_widths=[numbers[-1] for numbers in leaving],
            coming_widths=[numbers[-1] for numbers in coming],
        )

    def _travel(self, plan: ContextPlan, ids: Tensor, numbers: _Numbers) -> _Journey:
        """Find who goes where, and tell the ranks for which of their kv blocks."""
        leaving, coming = ([sum(of_head) for of_head in side] for side in (numbers.leaving, numbers.coming))
        num_kv_heads = len(numbers.leaving[0])
        rows, sent = [ids.new_empty(0, dtype=torch.int64)], [ids.new_empty(0)]
        slots = [ids.new_empty(0, 0, dtype=torch.int64)] * plan.size
        for rank, chosen_TNK in _chosen_elsewhere(plan, ids, numbers.hot_on_device_M):
            rows.append(_rows_that_go(chosen_TNK, num_kv_heads, leaving[rank]))
            kv_blocks, slot = chosen_TNK.flatten(0, 1)[rows[-1]].sort(dim=-1, descending=True)
            sent.append(kv_blocks[:, : numbers.leaving_widths[rank]].flatten())
            slots[rank] = slot[:, : numbers.leaving_widths[rank]]
        received = self.wire.all_to_all(
            torch.cat(sent),
            "plan",
            [n * w for n, w in zip(leaving, numbers.leaving_widths, strict=True)],
            [n * w for n, w in zip(coming, numbers.coming_widths, strict=True)],
        ).wait()
        guests = sum(coming)
        kv_blocks = received.new_full((guests, max(1, *numbers.coming_widths)), -1)
        row, place = 0, 0
        for number, width in zip(coming, numbers.coming_widths, strict=True):
            kv_blocks[row : row + number, :width] = received[place : place + number * width].view(number, width)
            row, place = row + number, place + number * width
        spans = upload(torch.tensor(numbers.coming), ids.device)
        head_R = torch.arange(num_kv_heads, device=ids.device).repeat(plan.size)
        return _Journey(
            rows=torch.cat(rows),
            leaving=leaving,
            coming=coming,
            slots=slots,
            kv_blocks=kv_blocks,
            order=head_R.repeat_interleave(spans.flatten(), output_size=guests).argsort(stable=True),
            of_kv_head=[sum(of_rank) for of_rank in zip(*numbers.coming, strict=True)],
        )

    def _send(self, journey: _Journey, source_TN: Tensor):
        """Query rows of [T, N, ...] to where they go: pending [guests, ...]."""
        rows = source_TN.flatten(0, 1).index_select(0, journey.rows)
        return self.wire.all_to_all(rows, "queries", journey.leaving, journey.coming)

    def _return(self, journey: _Journey, sorted_R: Tensor):
        """What guests (sorted by kv head) get goes home: pending, in order of `journey.rows`."""
        arrived = torch.empty_like(sorted_R)
        arrived[journey.order] = sorted_R
        return self.wire.all_to_all(arrived, "outputs", journey.coming, journey.leaving)

    def _return_blocks(self, journey: _Journey, sorted_Rw: Tensor):
        """The log-sum-exps of guests' kv blocks go home: pending, as many for each rank as it has `slots`, in a row."""
        arrived = torch.empty_like(sorted_Rw)
        arrived[journey.order] = sorted_Rw
        assert self._numbers is not None
        widths = self._numbers.coming_widths
        going = [rows[:, :width] for rows, width in zip(arrived.split(journey.coming), widths, strict=True)]
        return self.wire.all_to_all(
            torch.cat([rows.flatten() for rows in going]),
            "outputs",
            [rows.numel() for rows in going],
            [slots.numel() for slots in journey.slots],
        )

    @staticmethod
    def _guest_partials(
        plan: ContextPlan, journey: _Journey, guests: Queries, k: Tensor, v: Tensor
    ) -> Iterator[tuple[int, PartialAttention]]:
        """For each kv head its guests, as queries of one head, against this rank's keys."""
        kv_blocks = journey.kv_blocks[journey.order].unsqueeze(1)
        last = 0
        for kv_head, count in enumerate(journey.of_kv_head):
            first, last = last, last + count
            if count:
                some = {
                    field.name: None if (value := getattr(guests, field.name)) is None else value[first:last]
                    for field in dataclasses.fields(guests)
                }
                keys = Keys(k[:, kv_head : kv_head + 1], v[:, kv_head : kv_head + 1], 1)
                yield kv_head, PartialAttention(Queries(**some), keys, kv_blocks[first:last], plan.guest_choices)


def _chosen_elsewhere(plan: ContextPlan, ids: Tensor, hot_on_device_M: Tensor) -> Iterator[tuple[int, Tensor]]:
    """For each other rank its kv blocks that this rank's queries need there: int32 [T, N, slots], -1 for none."""
    for rank in range(plan.size):
        if rank != plan.rank:
            fragment = plan.fragment(rank)
            cold = fragment.kv_block_of_block.masked_fill(hot_on_device_M, -1)
            yield (
                rank,
                dataclasses.replace(fragment, kv_block_of_block=cold).chosen_kv_blocks(ids, slice(None), slice(None)),
            )


def _rows_that_go(chosen_TNK: Tensor, num_kv_heads: int, count: int) -> Tensor:
    """int64 [count]: query rows with a kv block there, sorted by kv head, token and head. `count` is known, so the
    host need not wait for it."""
    num_tokens, num_heads, _ = chosen_TNK.shape
    row_GTR = torch.arange(num_tokens * num_heads, device=chosen_TNK.device).view(num_tokens, num_kv_heads, -1)
    row_X = row_GTR.transpose(0, 1).flatten()
    goes_X = (chosen_TNK >= 0).any(dim=-1).view(num_tokens, num_kv_heads, -1).transpose(0, 1).flatten()
    # Rows that stay are all written to one place more, which is cut off.
    place_X = torch.where(goes_X, goes_X.cumsum(0) - 1, count)
    return row_X.new_empty(count + 1).scatter_(0, place_X, row_X)[:count]


def _combine_rows(queries: Queries, rows: Tensor, partial_out: Tensor, partial_lse: Tensor) -> None:
    """Combine partial outputs of some query rows, none twice, with what they have."""
    out, lse = queries.out.flatten(0, 1), queries.lse.flatten()
    weights, combined = combine_weights(torch.stack([lse[rows], partial_lse]))
    out[rows] = out[rows] * weights[0].unsqueeze(-1) + partial_out.to(out.dtype) * weights[1].unsqueeze(-1)
    lse[rows] = combined


def _combine_blocks(block_lse_TNK: Tensor, journey: _Journey, partial_lse: Tensor) -> None:
    """Combine what ranks report of the kv blocks of rows (`_return_blocks`) with the log-sum-exps of blocks, in the
    order of ranks."""
    block_lse, num_past = block_lse_TNK.flatten(0, 1), block_lse_TNK.shape[2]
    partials = partial_lse.split([slots.numel() for slots in journey.slots])
    for rows, slots, partial in zip(journey.rows.split(journey.leaving), journey.slots, partials, strict=True):
        # One place more, for the kv block of the row's own block.
        of_slots = partial.new_full((rows.numel(), num_past + 1), -torch.inf)
        of_slots.scatter_(1, slots, partial.view(slots.shape))
        block_lse[rows] = torch.logaddexp(block_lse[rows], of_slots[:, :num_past])


class DispatchKind(ExchangeKind):
    """The exchange of this module. Layers that attend fully have no blocks to dispatch queries to."""

    name = "dispatch"
    between = Dispatch
    suits_full = False
    depends_on_choices = True
    host_waits = 2

    def messages(
        self, sizes: RankSizes, context_size: int, levels: Levels | None = None, remote_owners: float | None = None
    ) -> list[Message]:
        """See `ExchangeKind`."""
        e, f = sizes.element_bytes, sizes.score_bytes
        past = max(0, (sizes.top_k or 1) - 1)
        owners = most_remote_owners(sizes, context_size) if remote_owners is None else remote_owners
        rows = sizes.tokens * sizes.heads * owners
        forward = rows * (2 * sizes.head_size * e + f + 4 * past)
        return [Message(int(forward), int(rows * (3 * sizes.head_size * e + 2 * f + 4 * past)), context_size)]

    def buffers(self, sizes: RankSizes, context_size: int, levels: Levels | None = None) -> int:
        """Queries as messages, and as what is made of them; gradients of keys and values."""
        (message,) = self.messages(sizes, context_size)
        return 2 * message.backward + sizes.tokens * sizes.kv_width * sizes.score_bytes + wide_output(sizes)


def most_remote_owners(sizes: RankSizes, context_size: int) -> int:
    """Bound of the other ranks that a query row goes to where a row is one document: its own and each chosen block may
    lie on as many ranks as they touch chunks of the zigzag layout, and one of them is here."""
    if sizes.block_size is None or sizes.top_k is None:
        return context_size - 1
    chunk = max(1, sizes.tokens // 2)
    parts = 1 + (sizes.block_size - 1) // chunk + (chunk % sizes.block_size != 0)
    return min(context_size - 1, sizes.top_k * parts - 1)


DISPATCH = DispatchKind()
