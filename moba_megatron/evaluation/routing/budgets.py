"""`--suggest-budget`: the smallest K of each key head with which its choice holds a share of full attention's mass.

For a K the mass held is the mean over the query heads of the key head, and over the sampled queries of the report that
have more than K - 1 past blocks: the others would attend everything. The query's own block counts. The sample is that
of the report: queries with more past blocks than the layer takes now. Where no K reaches the share (a threshold may
leave too much out), the number of blocks of the longest document is suggested.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from moba_megatron.config import Config
from moba_megatron.evaluation.routing.held_curve import HeldCurve, held_curve, queries_joined
from moba_megatron.evaluation.routing.routing_report import LayerRouting
from moba_megatron.model.schedule import LayerAttention

__all__ = ["SuggestedBudgets", "held_curve", "smallest_blocks", "suggested"]


@dataclass(frozen=True)
class SuggestedBudgets:
    """What is suggested.

    Attributes:
        share: of the mass, above 0 and up to 1.
        layers: by number, from 1: the settings of `attention.layers`, its `top_k` a list with one K for each key head,
            or a number where all are the same.
        left: layers in which no query has a choice, so that nothing is known of them.
    """

    share: float
    layers: dict[int, dict[str, Any]]
    left: tuple[int, ...] = ()

    def as_yaml(self, report: str) -> str:
        """What can be pasted into a configuration.

        Args:
            report: the name of the report that it was made with.
        """
        lines = [
            f"# The smallest K of each key head that holds {self.share:.0%} of full attention's mass ({report}).",
            *[f"# layer {number}: no query has a choice; nothing is known" for number in self.left],
            "attention:",
            "  layers:",
        ]
        for number, settings in self.layers.items():
            lines.append(
                f"    {number}: {yaml.safe_dump(settings, default_flow_style=True, sort_keys=False, width=1e6)}"
            )
        return "\n".join(line.rstrip() for line in lines) + "\n"


def suggested(
    layers: list[LayerRouting], share: float, config: Config, choice: LayerAttention | None = None
) -> SuggestedBudgets:
    """The budgets of the layers that were looked at.

    Args:
        layers: with curves.
        choice: that was looked at in place of the layers' own.
    """
    kv_heads, found, left = config.model.query_groups, {}, []
    for layer in layers:
        if not layer.curves:
            left.append(layer.layer)
            continue
        blocks = smallest_blocks(queries_joined(layer.curves), kv_heads, share)
        override = config.attention.layers.get(layer.layer)
        own = override.model_dump(exclude_none=True) if override is not None and choice is None else {}
        if choice is not None:
            own = {"kind": "moba", "block_size": choice.block_size, "selector": choice.selection.selector}
            own |= {"summary": choice.selection.summary} if choice.selection.uses_scores else {}
        found[layer.layer] = {**own, "top_k": blocks if len(set(blocks)) > 1 else blocks[0]}
    return SuggestedBudgets(share, found, tuple(left))


def smallest_blocks(curve: HeldCurve, kv_heads: int, share: float) -> list[int]:
    """K of each key head: see the module.

    Two key heads of one query head each, over two queries that have 3 past blocks:

    >>> import torch
    >>> curve = HeldCurve(torch.tensor([[1.0, 1.8, 1.9], [0.2, 0.4, 1.0]]).double(), torch.tensor([2.0, 2.0, 2.0]))
    >>> smallest_blocks(curve, 2, 0.9)
    [2, 4]
    """
    held_GM = curve.held.unflatten(0, (kv_heads, -1)).mean(dim=1) / curve.queries.clamp(min=1)
    # Sums of fp32 probabilities miss 1 by their last places.
    enough_GM = (held_GM >= share - 1e-6) & (curve.queries > 0)
    most = curve.queries.numel() + 1
    return [int(row.nonzero()[0]) + 1 if row.any() else most for row in enough_GM]
