"""Join the observations of all ranks: heads of one sample side by side, samples one after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moba_megatron.evaluation.routing.held_curve import heads_joined
from moba_megatron.evaluation.routing.mass import Mass
from moba_megatron.evaluation.routing.routing_report import LayerRouting
from moba_megatron.evaluation.routing.selection_counts import DocumentChoices, SelectionCounts, added


@dataclass(frozen=True)
class Part:
    """What was seen of the heads of one layer, from `first_head` on, in one sample."""

    sample: int
    first_head: int
    routing: LayerRouting


def gathered(parts: list[Part]) -> list[Part]:
    """The parts of all ranks on rank 0, none elsewhere. Collective."""
    if dist.get_world_size() == 1:
        return parts
    found: list[list[Part]] | None = [[] for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather_object(parts, found, dst=0)
    return [part for some in found or [] for part in some]


def merged(parts: list[Part]) -> list[LayerRouting]:
    """The layers, first one first."""
    layers = _grouped(parts, lambda part: part.routing.layer)
    return [
        _one_after_the_other([_side_by_side(heads) for heads in _grouped(layer, lambda part: part.sample)])
        for layer in layers
    ]


def _grouped(parts: list[Part], key: Callable[[Part], Any]) -> list[list[Part]]:
    groups: dict[Any, list[Part]] = defaultdict(list)
    for part in parts:
        groups[key(part)].append(part)
    return [groups[value] for value in sorted(groups)]


def _side_by_side(parts: list[Part]) -> LayerRouting:
    """The heads of one layer and sample; what does not depend on the head is the same in all parts."""
    routings = [part.routing for part in sorted(parts, key=lambda part: part.first_head)]
    first, counts = routings[0], [routing.counts for routing in routings]
    return LayerRouting(
        first.layer,
        first.attention,
        first.choices,
        SelectionCounts(
            counts[0].queries,
            counts[0].with_choice,
            torch.cat([one.chosen_at for one in counts]),
            counts[0].offered_at,
            [
                DocumentChoices(torch.cat([one.chosen for one in same]), same[0].even)
                for same in zip(*(one.documents for one in counts), strict=True)
            ],
        ),
        [
            [_heads_joined(same) for same in zip(*batch, strict=True)]
            for batch in zip(*(routing.masses for routing in routings), strict=True)
        ],
        [heads_joined(list(same)) for same in zip(*(routing.curves for routing in routings), strict=True)],
    )


def _heads_joined(masses: tuple[Mass, ...]) -> Mass:
    fields = ([mass.held for mass in masses], [mass.best for mass in masses], [mass.nearest for mass in masses])
    return Mass(*(torch.cat(field, dim=1) for field in fields))


def _one_after_the_other(samples: list[LayerRouting]) -> LayerRouting:
    first = samples[0]
    counts = added([sample.counts for sample in samples])
    masses = [batch for sample in samples for batch in sample.masses]
    curves = [curve for sample in samples for curve in sample.curves]
    return LayerRouting(first.layer, first.attention, first.choices, counts, masses, curves)
