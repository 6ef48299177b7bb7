"""Sizes of a mixture of experts on one rank: the tokens that it sends, the rows that its experts get, how far they go.

The load is taken as even: every expert gets as many tokens as any other, and every choice of experts is as likely.

Legend: t tokens of a rank (with sequence parallelism those of a tensor-parallel rank), K experts of a token out of E,
n expert-parallel ranks. A *row* is a token at one of its experts: t K leave a rank, and as many come to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moba_megatron.config import Config
from moba_megatron.planning.plan_stages import experts_of_rank, tokens_of_rank


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of one rank in a layer with experts.

    Attributes:
        tokens: t.
        sent: rows that leave the rank: t K, or what the capacity of experts leaves of them or fills them up to.
        rows: rows that its experts compute: as many, of each rank that shares its experts (`parallel.expert_tensor`).
        experts, top_k, local: E, K, and the experts of a rank.
        ranks, splits: expert-parallel and expert-tensor-parallel ranks.
        hidden: of a row; `ffn`: width of an expert on this rank.
        width, score_bytes: bytes of an element of a row and of a router's score.
        losses: how many scores of the router are kept for losses of their own.
    """

    tokens: int
    sent: int
    experts: int
    top_k: int
    local: int
    ranks: int
    splits: int
    hidden: int
    ffn: int
    width: int
    score_bytes: int
    losses: int
    dispatcher: str

    @classmethod
    def of(cls, config: Config) -> ExpertShape | None:
        """The shape of a configuration's rank, None for a dense model."""
        model, parallel = config.model, config.parallel
        if model.num_moe_experts is None:
            return None
        width = 2 if config.training.precision == "bf16" else 4
        tokens = tokens_of_rank(config) // (parallel.tensor if parallel.sequence else 1)
        balanced = model.moe_aux_loss_coeff > 0
        return cls(
            tokens=tokens,
            sent=_rows_sent(config, tokens),
            experts=model.num_moe_experts,
            top_k=model.moe_router_topk,
            local=experts_of_rank(config),
            ranks=parallel.expert,
            splits=parallel.expert_tensor,
            hidden=model.hidden_size,
            ffn=model.expert_ffn_size // parallel.expert_tensor,
            width=width,
            score_bytes={None: width, "fp32": 4, "fp64": 8}[model.moe_router_dtype],
            losses=balanced + (model.moe_z_loss_coeff is not None) + (model.moe_router_score_function == "sigmoid"),
            dispatcher=parallel.expert_dispatcher,
        )

    @property
    def rows(self) -> int:
        return self.sent * self.splits

    @property
    def group(self) -> int:
        """Ranks that hold one copy of all experts of a layer."""
        return self.ranks * self.splits

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.width


def _rows_sent(config: Config, tokens: int) -> int:
    model, rows = config.model, tokens * config.model.moe_router_topk
    if model.moe_expert_capacity_factor is None:
        return rows
    experts = model.num_moe_experts or 1
    capacity = experts * math.ceil(rows / experts * model.moe_expert_capacity_factor)
    return capacity if model.moe_pad_expert_input_to_capacity else min(rows, capacity)


def reached_share(config: Config, parts: int) -> float:
    """The chance that a token chooses an expert of one of `parts` equal parts of all experts.

    Without groups of experts it is 1 - C(E - E/parts, K) / C(E, K). With groups (`moe_router_num_groups`) a token
    chooses among them first, and then as many experts in each.
    """
    model = config.model
    experts, chosen = model.num_moe_experts or 1, model.moe_router_topk
    groups, group_topk = model.moe_router_num_groups, model.moe_router_group_topk
    if groups is None or group_topk is None:
        return _hit(experts, experts // parts, chosen)
    if parts <= groups:
        return _hit(groups, groups // parts, group_topk)
    size = experts // groups
    return group_topk / groups * _hit(size, max(1, experts // parts), chosen // group_topk)


def _hit(things: int, wanted: int, drawn: int) -> float:
    """The chance that one of the wanted things is among those drawn.

    >>> _hit(4, 1, 2), _hit(4, 4, 1)
    (0.5, 1.0)
    """
    return 1 - math.comb(things - wanted, drawn) / math.comb(things, drawn)
