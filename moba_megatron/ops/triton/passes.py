"""The work of a call, cut into passes that fit a workspace; the twin of `gathered.kv_heads`.

Legend: T tokens, N query heads, D head size, K past blocks per query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.kernel_sizes import default_workspace
from moba_megatron.ops.triton.fragments import DeviceFragment

# Entry numbers of a pass are int32.
MOST_ENTRIES = 2**31 - 1


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
    per_token = keys.qheads_per_kvhead * max(1, slots)
    most = max(per_token, min(budget // entry_bytes, MOST_ENTRIES))
    heads_at_once = kv_heads if slots == 0 else even_step(kv_heads, most // max(1, tokens * per_token))
    tokens_at_once = max(1, tokens) if slots == 0 else even_step(tokens, most // per_token)
    for kv_head in range(0, kv_heads, heads_at_once):
        some = slice(kv_head, min(kv_head + heads_at_once, kv_heads))
        for token in range(0, tokens, tokens_at_once):
            end = min(token + tokens_at_once, tokens)
            yield Pass(some, slice(token, end), keys.qheads_per_kvhead, keys.first_kv_head + kv_head, slots)


def even_step(count: int, most: int) -> int:
    """The step, at most `most` but at least 1, that cuts `count` into as few and equal steps as it allows.

    >>> even_step(10, 9), even_step(8, 100), even_step(0, 5)
    (5, 8, 1)
    """
    steps = -(-count // max(1, most))
    return max(1, -(-count // max(1, steps)))


def forward_entry_bytes(q_TND: Tensor) -> int:
    """Workspace for an entry: its partial output, log-sum-exp, kv block and place in the index."""
    return q_TND.shape[2] * q_TND.element_size() + 12


def backward_entry_bytes(q_TND: Tensor) -> int:
    """Workspace for an entry: its partial dq, kv block, place in the index, and at most its part of the partial dk and
    dv."""
    return q_TND.shape[2] * (q_TND.element_size() + 2) + 8
