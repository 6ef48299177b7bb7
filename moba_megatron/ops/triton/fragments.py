"""`ops.fragments.Fragment` on the device: units and triangles as tensors of boundaries, so that nothing is read on the
host.

Sizes of launches follow from the bounds `longest` and `total`, which the host knows without asking the device.

Legend: U units, Z triangles (stretches that attend themselves), T query tokens, M blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Fragment
from moba_megatron.ops.layout import BlockLayout


@dataclass(frozen=True)
class Stretches:
    """Stretches of adjacent rows; empty ones are allowed.

    Attributes:
        start, end: int64 [stretches], first row and one past the last of each.
        longest: an upper bound on the rows of one.
        total: an upper bound on the rows of all.
    """

    start: Tensor
    end: Tensor
    longest: int
    total: int

    @property
    def count(self) -> int:
        return self.start.numel()


@dataclass(frozen=True)
class DeviceFragment:
    """Which of some keys some queries see; the twin of `Fragment`.

    Attributes:
        units: keys that a query attends entirely or not at all. Two units share no row, or they start at the same row
            and all units between them do too.
        triangles: disjoint stretches of tokens that attend themselves causally.
        first_block_T, unit_of_block, own_unit_T: as in `Fragment`.
    """

    units: Stretches
    triangles: Stretches
    first_block_T: Tensor | None = None
    unit_of_block: Tensor | None = None
    own_unit_T: Tensor | None = None

    def per_query(self, num_past: int) -> int:
        """Slots of a query row for K = `num_past` ids: one for each id, and one for its own block's unit."""
        return num_past + (self.own_unit_T is not None)


def whole_pack(layout: BlockLayout) -> DeviceFragment:
    """All keys of a pack: a unit is a block, and every block attends itself causally. Reads nothing on the host."""
    longest = min(layout.block_size, layout.num_tokens)
    blocks = Stretches(layout.block_starts(), layout.block_ends(), longest, layout.num_tokens)
    return DeviceFragment(blocks, blocks, first_block_T=layout.first_block_T)


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
    triangles = [
        (first + i * length, first + (i + 1) * length)
        for first, stretches, length in fragment.triangles
        for i in range(stretches)
    ]
    return DeviceFragment(
        _stretches(fragment.units, device),
        _stretches(triangles, device),
        fragment.first_block_T,
        fragment.unit_of_block,
        fragment.own_unit_T,
    )


def _stretches(bounds: list[tuple[int, int]], device: torch.device) -> Stretches:
    lengths = [end - start for start, end in bounds]
    start, end = torch.tensor(bounds, dtype=torch.int64).view(-1, 2).to(device, non_blocking=True).unbind(1)
    # Copies, also of a single pair: kernels are compiled for addresses that are multiples of 16 bytes.
    return Stretches(start.clone(), end.clone(), max(lengths, default=0), sum(lengths))
