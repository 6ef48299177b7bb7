"""The work of a call of the kernels, cut into passes that fit a workspace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from moba_megatron.ops import kernel_sizes
from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.triton.fragments import DeviceFragment

# Entry numbers of a pass are int32.
MOST_ENTRIES = 2**31 - 1


@dataclass(frozen=True)
class Pass:
    """The query rows handled at once: of some key heads (of those at hand), a range of tokens.

    Attributes:
        group_size: R.
        first_head_group: the number of the pass's first key head among the key heads of the queries.
        slots: S.
    """

    groups: slice
    tokens: slice
    group_size: int
    first_head_group: int
    slots: int

    @property
    def num_groups(self) -> int:
        return self.groups.stop - self.groups.start

    @property
    def num_tokens(self) -> int:
        return self.tokens.stop - self.tokens.start

    @property
    def rows(self) -> int:
        return self.num_groups * self.num_tokens * self.group_size

    @property
    def entries(self) -> int:
        return self.rows * self.slots


@dataclass(frozen=True)
class Known:
    """What the backward pass knows of the query rows.

    Attributes:
        q, dout: contiguous [T, N, D] in one dtype.
        lse, delta: fp32 [T, N], of the whole attention.
    """

    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.dout, self.lse, self.delta


def passes(
    q_TND: Tensor, keys: Keys, num_past: int, fragment: DeviceFragment, entry_bytes: int, workspace_bytes: int | None
) -> Iterator[Pass]:
    """Cut a call into passes whose entries fit the workspace, all of about one size: key head by key head, then by
    tokens."""
    budget = kernel_sizes.default_workspace(q_TND.nbytes) if workspace_bytes is None else workspace_bytes
    tokens, groups, slots = q_TND.shape[0], keys.k.shape[1], fragment.per_query(num_past)
    per_token = keys.group_size * max(1, slots)
    most = max(per_token, min(budget // entry_bytes, MOST_ENTRIES))
    groups_at_once = groups if slots == 0 else even_step(groups, most // max(1, tokens * per_token))
    tokens_at_once = max(1, tokens) if slots == 0 else even_step(tokens, most // per_token)
    for group in range(0, groups, groups_at_once):
        some = slice(group, min(group + groups_at_once, groups))
        for token in range(0, tokens, tokens_at_once):
            end = min(token + tokens_at_once, tokens)
            yield Pass(some, slice(token, end), keys.group_size, keys.first + group, slots)


def even_step(count: int, most: int) -> int:
    """The step, at most `most` but at least 1, that cuts `count` into as few and equal parts as it allows.

    >>> even_step(10, 9), even_step(8, 100), even_step(0, 5)
    (5, 8, 1)
    """
    parts = -(-count // max(1, most))
    return max(1, -(-count // max(1, parts)))


def forward_entry_bytes(q_TND: Tensor) -> int:
    """Workspace for an entry of a forward pass."""
    return kernel_sizes.forward_entry_bytes(q_TND.shape[2], q_TND.element_size())


def backward_entry_bytes(q_TND: Tensor) -> int:
    """Workspace for an entry of a backward pass."""
    return kernel_sizes.backward_entry_bytes(q_TND.shape[2], q_TND.element_size())
