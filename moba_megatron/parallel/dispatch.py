"""`dispatch`: queries travel to the ranks that own their chosen blocks, and partial outputs come back, as tokens travel
to experts and back.

A query row (one token, one head) goes once to each rank that owns keys it needs, with the numbers of the units it
attends there; its partial output and log-sum-exp come back and are merged at home. In the backward pass the row goes
again, with the gradient of the output and two numbers of the whole attention, and its share of dq comes back. Keys,
values and their gradients stay where they are, but for the blocks that everybody wants (`copies`). What a rank sends
depends on its own tokens and the number of chosen blocks, not on the length of the sequence.

Rows are sorted by key head, then token, then head, and arrive in the order of ranks: nothing is added in an order left
open. The numbers of rows depend on the choices, so the host waits for each other rank's in every pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.combine import merge_weights
from moba_megatron.ops.fragments import Keys
from moba_megatron.parallel.context_plan import ContextPlan
from moba_megatron.parallel.copies import Copies, choose_copies, demanded
from moba_megatron.parallel.exchange import Queries, Task
from moba_megatron.parallel.exchange_kind import ExchangeKind, Levels, Message, Sizes, wide_output
from moba_megatron.parallel.wire import Wire, report_load


@dataclass(frozen=True)
class _Journey:
    """Which rows of this rank go where, and which of other ranks come here.

    Attributes:
        rows: int64, this rank's query rows (token * N + head) for all ranks one after the other.
        leaving, coming: rows for and from each rank.
        units: int32 [guests, w], units of this rank's keys that each guest attends, -1 for none.
        order: int64 [guests], guests sorted by key head.
        of_group: guests of each key head.
    """

    rows: Tensor
    leaving: list[int]
    coming: list[int]
    units: Tensor
    order: Tensor
    of_group: list[int]


class Dispatch:
    """See the module."""

    def __init__(self, wire: Wire):
        self.wire = wire

    def forward(self, plan: ContextPlan, queries: Queries, k: Tensor, v: Tensor, ids: Tensor) -> Iterator[Task]:
        """See `Exchange`."""
        group_size = queries.q.shape[1] // k.shape[1]
        hot_M, load = self._choose_copies(plan, ids, k.shape[1])
        copies = Copies(plan, self.wire, hot_M, k, v)
        journey = self._travel(plan, ids, hot_M, k.shape[1])
        report_load(dataclasses.replace(load, guests=sum(journey.coming)))
        coming_q = self._send(journey, queries.q)
        yield Task(queries, Keys(k, v, group_size), ids, plan.own_choices)
        q_RD = coming_q.wait()[journey.order]
        guests = Queries(
            q=q_RD.unsqueeze(1),
            out=torch.zeros_like(q_RD, dtype=queries.lse.dtype).unsqueeze(1),
            lse=queries.lse.new_full((q_RD.shape[0], 1), -torch.inf),
        )
        for _, task in self._guest_tasks(plan, journey, guests, k, v):
            yield task
        home = [self._return(journey, x) for x in (guests.out.squeeze(1).to(k.dtype), guests.lse.squeeze(1))]
        yield from copies.tasks(queries, ids, group_size)
        out, lse = (pending.wait() for pending in home)
        for rows, part, part_lse in zip(*(x.split(journey.leaving) for x in (journey.rows, out, lse)), strict=True):
            _merge_rows(queries, rows, part, part_lse)

    def backward(
        self, plan: ContextPlan, queries: Queries, k: Tensor, v: Tensor, ids: Tensor, dkv: Tensor
    ) -> Iterator[Task]:
        """See `Exchange`."""
        group_size = queries.q.shape[1] // k.shape[1]
        hot_M, _ = self._choose_copies(plan, ids, k.shape[1])
        copies = Copies(plan, self.wire, hot_M, k, v)
        journey = self._travel(plan, ids, hot_M, k.shape[1])
        coming_rows = self._send(journey, torch.stack([queries.q, queries.dout], dim=2))
        coming_numbers = self._send(journey, torch.stack([queries.lse, queries.delta], dim=2))
        yield Task(queries, Keys(k, v, group_size), ids, plan.fragment(plan.rank), dkv[0], dkv[1])
        rows, numbers = coming_rows.wait()[journey.order], coming_numbers.wait()[journey.order]
        guests = Queries(
            q=rows[:, 0].unsqueeze(1).contiguous(),
            dout=rows[:, 1].unsqueeze(1).contiguous(),
            lse=numbers[:, 0].unsqueeze(1).contiguous(),
            delta=numbers[:, 1].unsqueeze(1).contiguous(),
            dq=torch.zeros_like(rows[:, 0], dtype=numbers.dtype).unsqueeze(1),
        )
        for group, task in self._guest_tasks(plan, journey, guests, k, v):
            share = torch.zeros_like(dkv[:, :, :1])
            task.dk, task.dv = share[0], share[1]
            yield task
            dkv[:, :, group : group + 1] += share
        home = self._return(journey, guests.dq.squeeze(1).to(k.dtype))
        shares = copies.shares(k)
        yield from copies.tasks(queries, ids, group_size, shares)
        copies.bring_home(shares, dkv)
        dq = queries.dq.flatten(0, 1)
        for rows, part in zip(journey.rows.split(journey.leaving), home.wait().split(journey.leaving), strict=True):
            dq[rows] += part

    def _choose_copies(self, plan: ContextPlan, ids: Tensor, groups: int):
        demand_M = self.wire.all_reduce(demanded(plan, ids), "plan").wait()
        return choose_copies(plan, demand_M.cpu(), groups)

    def _travel(self, plan: ContextPlan, ids: Tensor, hot_M: Tensor, groups: int) -> _Journey:
        """Find who goes where, and tell the ranks how many come, and for what."""
        leaving = [_leave_for(plan, rank, ids, hot_M, groups) for rank in range(plan.size)]
        # For each rank: rows of each key head, and the most units of a row.
        counts = torch.stack([torch.cat([row_counts, row_counts.new_tensor([units.shape[1]])])
                              for _, units, row_counts in leaving])  # fmt: skip
        coming = self.wire.all_to_all(counts, "plan").wait()
        of_source, widths = coming[:, :-1], coming[:, -1].tolist()
        numbers = of_source.sum(dim=1).tolist()
        sent = [units.flatten() for _, units, _ in leaving]
        received = self.wire.all_to_all(
            torch.cat(sent), "plan", [x.numel() for x in sent], [n * w for n, w in zip(numbers, widths, strict=True)]
        ).wait()
        units = received.new_full((sum(numbers), max(1, *widths)), -1)
        row, place = 0, 0
        for number, width in zip(numbers, widths, strict=True):
            units[row : row + number, :width] = received[place : place + number * width].view(number, width)
            row, place = row + number, place + number * width
        head_R = torch.arange(groups, device=ids.device).repeat(plan.size).repeat_interleave(of_source.flatten())
        return _Journey(
            rows=torch.cat([rows for rows, _, _ in leaving]),
            leaving=[rows.numel() for rows, _, _ in leaving],
            coming=numbers,
            units=units,
            order=head_R.argsort(stable=True),
            of_group=of_source.sum(dim=0).tolist(),
        )

    def _send(self, journey: _Journey, source_TN: Tensor):
        """Query rows of [T, N, ...] to where they go: pending [guests, ...]."""
        rows = source_TN.flatten(0, 1).index_select(0, journey.rows)
        return self.wire.all_to_all(rows, "queries", journey.leaving, journey.coming)

    def _return(self, journey: _Journey, sorted_R: Tensor):
        """What guests (sorted by key head) get goes home: pending, in order of `journey.rows`."""
        arrived = torch.empty_like(sorted_R)
        arrived[journey.order] = sorted_R
        return self.wire.all_to_all(arrived, "outputs", journey.coming, journey.leaving)

    @staticmethod
    def _guest_tasks(
        plan: ContextPlan, journey: _Journey, guests: Queries, k: Tensor, v: Tensor
    ) -> Iterator[tuple[int, Task]]:
        """For each key head its guests, as queries of one head, against this rank's keys."""
        units = journey.units[journey.order].unsqueeze(1)
        last = 0
        for group, count in enumerate(journey.of_group):
            first, last = last, last + count
            if count:
                some = {
                    field.name: None if (value := getattr(guests, field.name)) is None else value[first:last]
                    for field in dataclasses.fields(guests)
                }
                keys = Keys(k[:, group : group + 1], v[:, group : group + 1], 1)
                yield group, Task(Queries(**some), keys, units[first:last], plan.own_units)


def _leave_for(plan: ContextPlan, rank: int, ids: Tensor, hot_M: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query rows that need keys of a rank, sorted by key head; their units there [rows, w]; rows of each key head."""
    num_tokens, num_heads = ids.shape[:2]
    if rank == plan.rank:
        return ids.new_empty(0, dtype=torch.int64), ids.new_empty(0, 0), ids.new_zeros(groups, dtype=torch.int64)
    fragment = plan.fragment(rank)
    cold = fragment.unit_of_block.masked_fill(hot_M.to(ids.device), -1)
    fragment = dataclasses.replace(fragment, unit_of_block=cold)
    units_TNK = fragment.chosen_units(ids, slice(None), slice(None))
    number_TN = (units_TNK >= 0).sum(dim=-1)
    by_group = torch.arange(num_tokens * num_heads, device=ids.device).view(num_tokens, groups, -1).transpose(0, 1)
    goes_GX = (number_TN > 0).view(num_tokens, groups, -1).transpose(0, 1).flatten(1)
    rows = by_group.flatten(1)[goes_GX]
    width = int(number_TN.max()) if number_TN.numel() else 0
    units = units_TNK.flatten(0, 1)[rows].sort(dim=-1, descending=True).values[:, :width]
    return rows, units.contiguous(), goes_GX.sum(dim=1)


def _merge_rows(queries: Queries, rows: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge partial outputs of some query rows, none twice, into what they have."""
    out, lse = queries.out.flatten(0, 1), queries.lse.flatten()
    weights, merged = merge_weights(torch.stack([lse[rows], part_lse]))
    out[rows] = out[rows] * weights[0].unsqueeze(-1) + part.to(out.dtype) * weights[1].unsqueeze(-1)
    lse[rows] = merged


class DispatchKind(ExchangeKind):
    """The exchange of this module. Layers that attend fully have no blocks to dispatch queries to."""

    name = "dispatch"
    between = Dispatch
    suits_full = False
    depends_on_choices = True

    def messages(
        self, sizes: Sizes, context_size: int, levels: Levels | None = None, remote_owners: float | None = None
    ) -> list[Message]:
        """See `ExchangeKind`."""
        e, f = sizes.element_bytes, sizes.score_bytes
        past = max(0, (sizes.top_k or 1) - 1)
        owners = most_remote_owners(sizes, context_size) if remote_owners is None else remote_owners
        rows = sizes.tokens * sizes.heads * owners
        forward = rows * (2 * sizes.head_size * e + f + 4 * past)
        return [Message(int(forward), int(rows * (3 * sizes.head_size * e + 2 * f + 4 * past)), context_size)]

    def buffers(self, sizes: Sizes, context_size: int, levels: Levels | None = None) -> int:
        """Queries as messages, and as what is made of them; gradients of keys and values."""
        (message,) = self.messages(sizes, context_size)
        return 2 * message.backward + sizes.tokens * sizes.kv_width * sizes.score_bytes + wide_output(sizes)


def most_remote_owners(sizes: Sizes, context_size: int) -> int:
    """Bound of the other ranks that a query row goes to where a row is one document: its own and each chosen block may
    lie on as many ranks as they touch chunks of the zigzag layout, and one of them is here."""
    if sizes.block_size is None or sizes.top_k is None:
        return context_size - 1
    chunk = max(1, sizes.tokens // 2)
    parts = 1 + (sizes.block_size - 1) // chunk + (chunk % sizes.block_size != 0)
    return min(context_size - 1, sizes.top_k * parts - 1)


DISPATCH = DispatchKind()
