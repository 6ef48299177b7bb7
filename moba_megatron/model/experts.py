"""Mixtures of experts: megatron-core's layers with a router whose losses and counts do not depend on the layout.

megatron-core's router splits the balancing loss of a microbatch over the tensor- and context-parallel ranks that share
it, and attaches each part to its own tokens. With a loss per token, gradients are divided in the end by all tokens that
count, so each part has to be multiplied by the tokens of the whole microbatch. Before 0.19 it is multiplied by those of
this rank, which makes the gradients too small by the number of ranks; from 0.19 on by those of this rank and the number
of ranks, which is right where all have as many. Packs are padded document by document under context parallelism, so
they have not. `Router` counts the tokens of all ranks, in every release.

The other difference is the tokens that count. Padding has no part in losses, load and bias. The results of a step are
kept in sums (`Tally`) that the trainer reads.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from moba_megatron.config import ModelConfig, ParallelConfig

LOSSES = ("balance_loss", "z_loss")
"""Auxiliary losses, in the order of their sums."""


def expert_settings(model: ModelConfig, parallel: ParallelConfig, *, grouped: bool) -> dict[str, Any]:
    """Settings of megatron-core's TransformerConfig for the experts of a model; without any, what dense ones need.

    Args:
        grouped: whether all experts of a rank are one product of Transformer Engine; otherwise one after the other.
    """
    # Together with packs of unequal length megatron-core refuses its default dispatcher for dense models as well.
    settings: dict[str, Any] = {"moe_token_dispatcher_type": parallel.expert_dispatcher}
    if model.num_moe_experts is None:
        return settings
    names = [name for name in type(model).model_fields if name.startswith("moe_")]
    return {
        **settings,
        **{name: getattr(model, name) for name in names},
        "num_moe_experts": model.num_moe_experts,
        "moe_ffn_hidden_size": model.expert_ffn_size,
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def with_routers(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """A copy of a block's specs whose mixtures of experts have our router; dense layers stay the same objects."""
    changed: dict[int, ModuleSpec] = {}
    for layer in block.layer_specs:
        changed.setdefault(id(layer), _with_router(layer))
    block = copy.copy(block)
    block.layer_specs = [changed[id(layer)] for layer in block.layer_specs]
    return block


def _with_router(layer: ModuleSpec) -> ModuleSpec:
    # A spec, or from megatron-core 0.19 on a partial call, with the same submodules.
    mlp = layer.submodules.mlp
    partial = isinstance(mlp, functools.partial)
    submodules = mlp.keywords.get("submodules") if partial else getattr(mlp, "submodules", None)
    if not hasattr(submodules, "router"):
        return layer
    submodules = copy.copy(submodules)
    submodules.router = Router
    layer = copy.copy(layer)
    layer.submodules = copy.copy(layer.submodules)
    if partial:
        layer.submodules.mlp = functools.partial(mlp.func, *mlp.args, **{**mlp.keywords, "submodules": submodules})
    else:
        layer.submodules.mlp = copy.copy(mlp)
        layer.submodules.mlp.submodules = submodules
    return layer


def mark_experts(chunks: list[torch.nn.Module], parallel: ParallelConfig) -> None:
    """Let the gradients of experts be added up over the ranks that hold the same experts. Before data parallelism wraps
    the chunks.

    megatron-core does so where `expert` is above 1. Otherwise it takes experts for dense layers, which is wrong where
    they are split over another number of ranks than those: gradients stay apart, or parts of different rows are added.
    """
    if parallel.expert_tensor == parallel.tensor:
        return
    for chunk in chunks:
        for layer in chunk.modules():
            if isinstance(layer, MoELayer):
                for parameter in layer.experts.parameters():
                    parameter.allreduce = False


@dataclass
class Tally:
    """Sums over the tokens of this rank since they were read. Padding does not count.

    load: [experts] tokens that each expert got.
    tokens: how many there were.
    losses: [2] of each of `LOSSES`, without its weight, the value of each microbatch times its tokens.
    """

    load: Tensor
    tokens: Tensor
    losses: Tensor

    @staticmethod
    def empty(experts: int, device: torch.device | str) -> Tally:
        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        return Tally(zeros(experts), zeros(1), zeros(len(LOSSES)))

    def flat(self) -> Tensor:
        """All sums, [experts + 3]."""
        return torch.cat([self.load, self.tokens, self.losses])


class Router(TopKRouter):
    """megatron-core's top-k router; see the module for what differs."""

    tally: Tally | None = None
    _tokens_here: Tensor | int = 0
    """Tokens of the microbatch on this rank, without padding."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor]:
        """As `TopKRouter.routing`.

        Args:
            logits: [s, b, experts].
            padding_mask: [s, b] bool, True for padding.
        """
        padding = None if padding_mask is None else padding_mask.reshape(-1)
        self._tokens_here = logits.shape[:2].numel() if padding is None else (~padding).sum()
        probs, routing_map = super().routing(logits, padding_mask=padding_mask, **more)
        if self._counts():
            self._count(probs.detach(), routing_map, padding)
            if not self.training:
                self._evaluate_balance(logits.detach().flatten(0, 1), padding)
        return probs, routing_map

    def _counts(self) -> bool:
        """Whether this pass counts: of the two passes of recomputation in training, the second."""
        return not self.training or torch.is_grad_enabled()

    def _sums(self, device: torch.device) -> Tally:
        if self.tally is None:
            self.tally = Tally.empty(self.num_experts, device)
        return self.tally

    @torch.no_grad()
    def _count(self, probs: Tensor, routing_map: Tensor, padding: Tensor | None) -> None:
        # Padding of experts to their capacity is in the map, without a weight.
        sent = routing_map & (probs > 0) if self.config.moe_pad_expert_input_to_capacity else routing_map
        if padding is not None:
            sent = sent & ~padding.unsqueeze(-1)
        sums = self._sums(probs.device)
        sums.load += sent.sum(dim=0)
        sums.tokens += self._tokens_here

    def _record(self, name: str, value: Tensor) -> None:
        self._sums(value.device).losses[LOSSES.index(name)] += value.detach()

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: dist.ProcessGroup,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """Attach this rank's part of the balancing loss, times the tokens that it is a mean over, and keep it.

        Args:
            activation: [tokens, experts] that the loss is attached to.
            aux_loss: the part, times `aux_loss_coeff`; the parts of the ranks of `reduce_group` add up.
        """
        weighted = aux_loss * self._tokens_of(reduce_group)
        self._record("balance_loss", weighted / aux_loss_coeff)
        return MoEAuxLossAutoScaler.apply(activation, weighted)

    def _tokens_of(self, group: dist.ProcessGroup) -> Tensor | int:
        """Tokens of all ranks of a group."""
        if not isinstance(self._tokens_here, Tensor):
            return self._tokens_here * group.size()
        tokens = self._tokens_here.clone()
        dist.all_reduce(tokens, group=group)
        return tokens

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach the z-loss: its mean over the tokens, times their number, is its sum.

        Args:
            logits: [tokens, experts].
            padding_mask: [tokens] bool, True for padding.
        """
        weight = self.config.moe_z_loss_coeff
        if weight is None or not self._counts():
            return logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        squares = wide.logsumexp(dim=-1).square()
        total = squares.sum() if padding_mask is None else squares.masked_fill(padding_mask, 0.0).sum()
        self._record("z_loss", total)
        return MoEAuxLossAutoScaler.apply(logits, weight * total) if self.training else logits

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count what the bias is updated by; megatron-core's own cannot take a mask."""
        if not (self.enable_expert_bias and self.training and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            if padding_mask is not None:
                routing_map = routing_map & ~padding_mask.unsqueeze(-1)
            self.local_tokens_per_expert += routing_map.sum(dim=0)

    @torch.no_grad()
    def _evaluate_balance(self, logits: Tensor, padding: Tensor | None) -> None:
        """Keep the balancing loss of a microbatch of validation, where nothing is attached."""
        if not self.is_aux_loss_enabled():
            return
        chosen, scores = compute_routing_scores_for_aux_loss(
            logits, self.topk, self.score_function, padding_mask=padding
        )
        load = chosen.sum(dim=0).to(scores.dtype)
        dist.all_reduce(load, group=self.tp_cp_group)
        tokens = max(float(self._tokens_of(self.tp_cp_group)), 1.0)
        self._record("balance_loss", (scores.sum(dim=0) * load).sum() * (self.num_experts / (self.topk * tokens)))


def routers(chunks: list[torch.nn.Module]) -> Iterator[Router]:
    """The routers of model chunks, in the order of their layers."""
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, Router))


def read_tallies(chunks: list[torch.nn.Module], model: ModelConfig, device: torch.device) -> Tensor:
    """The counts of all ranks in each layer since the last call: fp64 [layers, experts + 3], as `Tally.flat`.
    Collective."""
    assert model.num_moe_experts is not None, "a dense model has no routers"
    width = model.num_moe_experts + 1 + len(LOSSES)
    sums = torch.zeros(model.num_layers, width, dtype=torch.float64, device=device)
    for router in routers(chunks):
        if router.tally is not None:
            sums[router.layer_number - 1] = router.tally.flat()
            router.tally = None
    # Each token is on one rank of a pipeline stage, each layer on one stage.
    dist.all_reduce(sums)
    return sums


def expert_biases(chunks: list[torch.nn.Module]) -> list[Tensor]:
    """The biases of balanced routers, themselves. They change with the gradients, before the update of the weights."""
    return [router.expert_bias for router in routers(chunks) if router.expert_bias is not None]
