"""The work of a call, cut into passes that fit a workspace, as `gathered.kv_heads` cuts it.

Legend: T tokens, N query heads, D head size, K past blocks per query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from moba_megatron.ops import kernel_sizes
from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.kernel_sizes import default_workspace, pass_sizes
from moba_megatron.ops.triton.fragments import DeviceFragment


@dataclass(frozen=True)
class Pass:
    """The query rows handled at once: of some kv heads (of those at hand), a range of tokens.

    Attributes:
        first_kv_head: number of the pass's first kv head among all those that the queries have.
        num_slots: slots of a row.
    """

    kv_heads: slice
    tokens: slice
    qheads_per_kvhead: int
    first_kv_head: int
    num_slots: int

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads.stop - self.kv_heads.start

    @property
    def num_tokens(self) -> int:
        return self.tokens.stop - self.tokens.start

    @property
    def num_rows(self) -> int:
        return self.num_kv_heads * self.num_tokens * self.qheads_per_kvhead

    @property
    def num_entries(self) -> int:
        """Of all slots, attended or not."""
        return self.num_rows * self.num_slots


@dataclass(frozen=True)
class QueryRows:
    """What the backward pass knows of the query rows.

    Attributes:
        q, do: contiguous [T, N, D] in one dtype.
        lse, delta: fp32 [T, N], of the whole attention.
    """

    q: Tensor
    do: Tensor
    lse: Tensor
    delta: Tensor


def passes(
    q_TND: Tensor, keys: Keys, num_past: int, fragment: DeviceFragment, entry_bytes: int, workspace_bytes: int | None
) -> Iterator[Pass]:
    """Cut a call into passes whose entries fit the workspace, all of about one size: kv head by kv head, then by
    tokens."""
    budget = default_workspace(q_TND.nbytes) if workspace_bytes is None else workspace_bytes
    tokens, kv_heads, slots = q_TND.shape[0], keys.k.shape[1], fragment.num_slots(num_past)
    heads_at_once, tokens_at_once = pass_sizes(tokens, kv_heads, keys.qheads_per_kvhead, slots, entry_bytes, budget)
    for kv_head in range(0, kv_heads, heads_at_once):
        some = slice(kv_head, min(kv_head + heads_at_once, kv_heads))
        for token in range(0, tokens, tokens_at_once):
            end = min(token + tokens_at_once, tokens)
            yield Pass(some, slice(token, end), keys.qheads_per_kvhead, keys.first_kv_head + kv_head, slots)


def forward_entry_bytes(q_TND: Tensor) -> int:
    """`kernel_sizes.forward_entry_bytes` for queries."""
    return kernel_sizes.forward_entry_bytes(q_TND.shape[2], q_TND.element_size())


def backward_entry_bytes(q_TND: Tensor) -> int:
    """`kernel_sizes.backward_entry_bytes` for queries."""
    return kernel_sizes.backward_entry_bytes(q_TND.shape[2], q_TND.element_size())
