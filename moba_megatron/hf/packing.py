"""Further arguments of collators for packed rows, compared with `position_ids`.

Trainers that pack (TRL's `packing` and `padding_free`, transformers' `DataCollatorWithFlattening`) also pass where the
documents of a batch begin: `cu_seq_lens_q` and `cu_seq_lens_k`, boundaries in the rows laid end to end, and `seq_idx`,
the document of each token. MoBA reads documents from the mask and `position_ids` (`mask.segments`). The others must
describe the same documents; then they are ignored. `max_length_q` and `max_length_k` only size the kernels of others.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moba_megatron.hf.mask import Segment

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
NUMBERS = "seq_idx"
_SHOWN = 8


def check_packing(mask: Tensor, stretches: Sequence[Segment], rows: int, length: int, told: Mapping[str, Any]) -> None:
    """Compare other arguments about packing with the documents that were read; once per forward pass.

    Args:
        mask: what `moba_mask` returned; it carries the note that this was done.
        stretches: what `segments` read in it.
        rows, length: of the batch, in tokens.
        told: keywords of the call; `cu_seq_lens_q`, `cu_seq_lens_k` and `seq_idx` are looked at. Tokens after the last
            boundary, and padding, belong to no document that these could contradict.

    Raises:
        ValueError: they tell other documents, or rows that go on from a cache.
    """
    given = {name: told[name] for name in (*BOUNDARIES, NUMBERS) if told.get(name) is not None}
    checked = getattr(mask, "moba_packing", {})
    if checked.keys() == given.keys() and all(checked[name] is given[name] for name in given):
        return
    if any(s.past for s in stretches):
        raise ValueError(f"{' and '.join(given)} with a cache: packed rows cannot continue; give each text a row")
    # One tensor is mostly passed under both names: it is read once.
    tensors = {id(value): (name, value) for name, value in reversed(given.items())}
    for name, value in tensors.values():
        told_starts, end = _of_numbers(value, rows, length) if name == NUMBERS else _of_boundaries(name, value)
        if end > rows * length:
            raise ValueError(
                f"{name} ends at token {end}, but the batch has {rows} x {length} = {rows * length} tokens"
            )
        _compare(name, told_starts, end, [(s.row * length + s.start, s.row * length + s.end) for s in stretches])
    # Layers of one forward pass get the same tensors, and none reads them again.
    mask.moba_packing = given


def _of_boundaries(name: str, value: Any) -> tuple[list[int], int]:
    """Where documents begin, and where the last one ends."""
    bounds = torch.as_tensor(value).flatten().tolist()
    if not bounds or bounds[0] != 0 or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"{name} = {_shown(bounds)} must rise from 0")
    return sorted(set(bounds[:-1])), bounds[-1]


def _of_numbers(value: Any, rows: int, length: int) -> tuple[list[int], int]:
    numbers = torch.as_tensor(value)
    if numbers.numel() != rows * length:
        raise ValueError(f"{NUMBERS} of shape {tuple(numbers.shape)} must have one entry for each of {rows} x {length}")
    begins = torch.ones(rows, length, dtype=torch.bool, device=numbers.device)
    numbers = numbers.reshape(rows, length)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return begins.flatten().nonzero().flatten().tolist(), rows * length


def _compare(name: str, told: list[int], end: int, read: list[tuple[int, int]]) -> None:
    """Every document that was read begins where one is told, and none is told within it."""
    known, starts = set(told), [start for start, _ in read]
    missing = [start for start, stop in read if start < end and (start not in known or stop > end)]
    before = [bisect.bisect_right(starts, start) - 1 for start in told]
    inside = [t for t, at in zip(told, before, strict=True) if at >= 0 and starts[at] < t < read[at][1]]
    if missing or inside:
        raise ValueError(
            f"{name} and position_ids describe different documents: {name} begins them at {_shown(told)} of the rows "
            f"laid end to end and ends at {end}, position_ids and attention_mask begin them at {_shown(starts)}. Pass "
            "position_ids that start again at 0 in each document, as transformers' DataCollatorWithFlattening does, "
            f"or leave {name} out"
        )


def _shown(numbers: list[int]) -> str:
    rest = len(numbers) - _SHOWN
    return f"[{', '.join(map(str, numbers[:_SHOWN]))}{f', ... {rest} more' if rest > 0 else ''}]"
