"""The keys that a query may see: from the batch arguments of transformers to stretches of tokens.

transformers asks its registered mask function once per forward pass, and hands the result to every layer. Ours returns
a small tensor of integers instead of a matrix: for each query the cache slots from its document's first token to
itself. Padding, on either side, sees nothing. That is all that MoBA needs: blocks start at a document's first token,
however many slots of padding or of other documents lie before it.

transformers' own mask function (causal, packed rows, windows, ...) is a predicate on (row, head, query, key). It is
asked for the pairs that decide: neighbours belong to one document or not; a document's first token must be seen by all
of its later ones (else there is a window), and no token by the one before it (else the mask is not causal).

`segments` then reads the tensor, once per forward pass, as stretches of queries that continue one document each. Packed
rows also show themselves there by positions that start again, since transformers itself tells packed rows only where
neither a mask nor a cache is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

_NO_MASK = -1


@torch.compiler.disable
def moba_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str | None = None,
    **_: object,
) -> Tensor:
    """The mask function registered as "moba"; arguments as transformers passes them (4.57: `cache_position`).

    Returns:
        int32 [batch, 1, queries, 2]: first slot of the query's document, and one past the query's own slot; both 0 for
        padding. Four dimensions, so that transformers passes it on where a mask is made ahead (static caches).

    A mask that is not causal, or has a window, is refused by the first layer that attends with it: some models (Qwen 2
    MoE) make one for layers of a window in any case, and have no such layer.

    Raises:
        ValueError: additions to the mask, or padding between real tokens.
    """
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    if attention_mask is not None:
        device = attention_mask.device
    offset = int(q_offset)
    end = offset + int(q_length)
    if kv_offset:
        raise ValueError(
            f"the cache has dropped its first {kv_offset} tokens (a window): MoBA needs a cache of all tokens"
        )
    if use_vmap:
        raise ValueError("this model combines the causal mask with its own: MoBA supports only causal masks")
    slots = torch.arange(end, device=device)
    real = torch.ones(batch_size, end, dtype=torch.bool, device=device)
    if attention_mask is not None:
        if attention_mask.shape[1] < end:
            raise ValueError(f"attention_mask covers {attention_mask.shape[1]} tokens, cache and input hold {end}")
        real = attention_mask[:, :end].bool()
        _refuse_gaps(real)
    begins = real.clone()
    begins[:, 1:] &= ~real[:, :-1]
    if mask_function is not causal_mask_function:
        begins[:, 1:] |= real[:, 1:] & ~_sees(mask_function, slots[1:], slots[:-1], batch_size)
    first = torch.where(begins, slots, 0).cummax(dim=1).values
    if mask_function is not causal_mask_function:
        reason = _not_moba(mask_function, first, real, begins, slots)
        if reason is not None:
            return _refused(reason, batch_size, end - offset, slots.device)
    spans = torch.stack([first, (slots + 1).expand_as(first)], dim=-1) * real.unsqueeze(-1)
    return spans[:, None, offset:].to(torch.int32).contiguous()


def _sees(mask_function: Callable, queries: Tensor, keys: Tensor, batch_size: int) -> Tensor:
    """bool [batch, pairs]: the predicate for pairs of slots, each [pairs] or [batch, pairs]."""
    rows = torch.arange(batch_size, device=queries.device).unsqueeze(1)
    shape = torch.broadcast_shapes((batch_size, 1), queries.shape)
    seen = mask_function(rows.expand(shape), rows.new_zeros(()), queries.expand(shape), keys.expand(shape))
    return torch.as_tensor(seen, device=queries.device).expand(shape)


def _refuse_gaps(real: Tensor) -> None:
    runs = (real[:, 1:] & ~real[:, :-1]).sum(dim=1) + real[:, 0]
    if (runs > 1).any():
        row = int((runs > 1).nonzero()[0])
        raise ValueError(
            f"attention_mask has padding between real tokens in row {row}: MoBA's blocks need them side by side; "
            "pad on the left to generate"
        )


def _not_moba(mask_function: Callable, first: Tensor, real: Tensor, begins: Tensor, slots: Tensor) -> str | None:
    """The difference between a mask and MoBA, for a message."""
    batch_size = first.shape[0]
    if (real & ~_sees(mask_function, slots, first, batch_size)).any():
        return "the mask hides early tokens of a document (a window): MoBA attends to all past tokens"
    inside = real[:, 1:] & ~begins[:, 1:]
    if (inside & _sees(mask_function, slots[:-1], slots[1:], batch_size)).any():
        return "the mask lets tokens see later ones: MoBA is causal"
    return None


def _refused(reason: str, batch_size: int, queries: int, device: torch.device) -> Tensor:
    """A mask that no layer may attend with: its numbers say so, and a note says why."""
    mask = torch.full((batch_size, 1, queries, 2), _NO_MASK, dtype=torch.int32, device=device)
    mask.moba_refused = reason
    return mask


@dataclass(frozen=True)
class Segment:
    """Queries that continue one document.

    Attributes:
        row: of the batch.
        start, end: their indices among the row's queries.
        first: cache slot of the document's first token.
        past: tokens of the document before them, in the cache.
    """

    row: int
    start: int
    end: int
    first: int
    past: int

    @property
    def length(self) -> int:
        """Tokens of the document up to the last of these queries."""
        return self.past + self.end - self.start


def segments(mask: Tensor, position_ids: Tensor | None) -> list[Segment]:
    """Read what `moba_mask` returned, once: layers of one forward pass get the same list.

    Args:
        mask: int32 [batch, 1, queries, 2].
        position_ids: integers [batch or 1, queries]; where they do not rise a document begins. Other shapes are
            not looked at.

    Raises:
        ValueError: a mask that is not ours, or not MoBA's, or a packed row that is continued from a cache.
    """
    _check_mask(mask)
    known = getattr(mask, "moba_segments", None)
    if known is not None and known[0] is position_ids:
        return known[1]
    first, stop = mask[:, 0].unbind(-1)
    if (stop == _NO_MASK).any():
        raise ValueError(getattr(mask, "moba_refused", "the mask of this layer is not causal, or has a window"))
    real = stop > 0
    begins = real.clone()
    begins[:, 1:] &= ~real[:, :-1] | (first[:, 1:] != first[:, :-1])
    positions = position_ids if position_ids is not None and position_ids.shape[-1:] == first.shape[-1:] else None
    if positions is not None and positions.dim() == 2:
        positions = positions.to(first.device).expand_as(first)
        restarts = real[:, 1:] & real[:, :-1] & (positions[:, 1:] <= positions[:, :-1])
        begins[:, 1:] |= restarts
        first = first.clone()
        first[:, 1:] = torch.where(restarts, stop[:, 1:] - 1, first[:, 1:])
        first = first.cummax(dim=1).values
    else:
        positions = None
    found = _read(begins, real, first, stop, positions)
    # A note on the tensor itself: it lives as long as the forward pass, and spares reading it again in each layer.
    mask.moba_segments = (position_ids, found)
    return found


def _check_mask(mask: Tensor | None) -> None:
    if mask is None:
        raise ValueError("no mask reached MoBA: this model does not use transformers' mask interface")
    if mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != 2:
        raise ValueError(
            f"MoBA takes padding masks [batch, tokens], got a mask of {mask.dtype} and shape {tuple(mask.shape)}"
        )


def _read(begins: Tensor, real: Tensor, first: Tensor, stop: Tensor, positions: Tensor | None) -> list[Segment]:
    rows, starts = begins.nonzero(as_tuple=True)
    ends = real.clone()
    ends[:, :-1] &= ~real[:, 1:] | begins[:, 1:]
    last = ends.nonzero(as_tuple=True)[1]
    values = [rows, starts, last + 1, first[rows, starts], stop[rows, starts] - 1]
    if positions is not None:
        values.append(positions[rows, starts])
    found = []
    for row, start, end, begin, slot, *position in torch.stack([x.long() for x in values], dim=1).tolist():
        past = slot - begin
        if position and position[0] < past:
            raise ValueError(
                f"row {row} goes on at position {position[0]} after {past} tokens in the cache: packed rows cannot "
                f"continue from a cache; give each document its own row"
            )
        found.append(Segment(row, start, end, begin, past))
    return found
