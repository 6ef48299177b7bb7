"""`ops.fragments.Fragment` on the device: kv blocks and causal spans as tensors of boundaries, so that nothing is read
on the host.

Sizes of launches follow from the bounds `longest` and `total`, which the host knows without asking the device.

Legend: T query tokens, M blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Fragment
from moba_megatron.ops.layout import BlockLayout
from moba_megatron.ops.upload import upload


@dataclass(frozen=True)
class Spans:
    """Spans of rows; empty ones are allowed.

    Attributes:
        start, end: int64 [spans], first row and one past the last of each.
        longest: an upper bound on the rows of one.
        total: an upper bound on the rows of all.
        cuts: their splits by sizes, made once and kept with them (`splits.cut_spans`).
    """

    start: Tensor
    end: Tensor
    longest: int
    total: int
    cuts: dict[tuple[int, int], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def count(self) -> int:
        return self.start.numel()


@dataclass(frozen=True)
class DeviceFragment:
    """Which of some keys some queries see, as `Fragment` for the device.

    Attributes:
        kv_blocks: two of them share no row, or they start at the same row and all kv blocks between them do too.
        causal_spans: disjoint.
        first_block_T, kv_block_of_block, own_kv_block_T, most_held: as in `Fragment`.
        covers_keys: every key row is in a kv block and in a causal span, and no two kv blocks share one.
    """

    kv_blocks: Spans
    causal_spans: Spans
    first_block_T: Tensor | None = None
    kv_block_of_block: Tensor | None = None
    own_kv_block_T: Tensor | None = None
    most_held: int | None = None
    covers_keys: bool = False

    def gathers(self, num_past: int) -> bool:
        """Whether a row has fewer slots than ids: only for blocks that are at hand, in the order of its ids."""
        knows = self.most_held is not None and self.kv_block_of_block is not None and self.first_block_T is not None
        return knows and self.most_held < num_past

    def num_slots(self, num_past: int) -> int:
        """Slots of a query row: for its ids, or those that can be at hand, and as in `Fragment` for its own block."""
        return (self.most_held if self.gathers(num_past) else num_past) + (self.own_kv_block_T is not None)


def whole_pack(layout: BlockLayout) -> DeviceFragment:
    """All keys of a pack, as `ops.fragments.whole_pack`. Reads nothing on the host; made once, and kept with the
    layout."""
    if "triton" not in layout.device_forms:
        longest = min(layout.block_size, layout.num_tokens)
        blocks = Spans(layout.block_starts(), layout.block_ends(), longest, layout.num_tokens)
        layout.device_forms["triton"] = DeviceFragment(
            blocks, blocks, first_block_T=layout.first_block_T, covers_keys=True
        )
    return layout.device_forms["triton"]


def on_device(fragment: Fragment | DeviceFragment, device: torch.device) -> DeviceFragment:
    """The device form of a fragment; one that has it already is returned as it is.

    Copying the boundaries costs a transfer, so the fragment keeps its device form: a second call copies nothing.
    """
    if isinstance(fragment, DeviceFragment):
        return fragment
    if device not in fragment.device_forms:
        fragment.device_forms[device] = _device_form(fragment, device)
    return fragment.device_forms[device]


def _device_form(fragment: Fragment, device: torch.device) -> DeviceFragment:
    causal_spans = [
        (first + i * length, first + (i + 1) * length)
        for first, spans, length in fragment.causal_spans
        for i in range(spans)
    ]
    return DeviceFragment(
        _spans(fragment.kv_blocks, device),
        _spans(causal_spans, device),
        fragment.first_block_T,
        fragment.kv_block_of_block,
        fragment.own_kv_block_T,
        fragment.most_held,
    )


def _spans(bounds: list[tuple[int, int]], device: torch.device) -> Spans:
    lengths = [end - start for start, end in bounds]
    start, end = upload(torch.tensor(bounds, dtype=torch.int64).view(-1, 2), device).unbind(1)
    # Copies, also of a single pair: kernels are compiled for addresses that are multiples of 16 bytes.
    return Spans(start.clone(), end.clone(), max(lengths, default=0), sum(lengths))
