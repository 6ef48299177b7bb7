"""A dense model becomes a mixture of experts (sparse upcycling, arXiv 2212.05055).

Every expert starts as a copy of the layer's feed-forward, and the weights of the chosen experts add up to 1. So the
output of the layer does not depend on the choice: without noise the first logits equal those of the dense model. The
router starts with random weights. With a router of zeros all tokens would choose the same experts; with random weights
experts get different tokens, and so different gradients.

transformers supports biases on queries, keys and values (Qwen 2) in a mixture only together with a shared expert. Such
a model gets one as wide as the feed-forward. Its down projection and gate start at 0, so its output is 0 at first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.config import ConfigError, ModelConfig
from moba_megatron.config.families import families_of
from moba_megatron.convert.expert_mapping import ROUTER, SHARED_GATE, is_expert
from moba_megatron.convert.families import refusals
from moba_megatron.convert.mapping import layer_of
from moba_megatron.convert.safetensors_folder import SafetensorsFolder
from moba_megatron.convert.weights import arrangement_of, canonical_parameters, copy_parameter

BALANCE = 0.01
"""Weight of the balancing loss that training goes on with."""
_SHARED = "mlp.shared_experts."


@dataclass(frozen=True)
class Upcycling:
    """The settings of the mixture.

    Attributes:
        experts: of every layer.
        experts_per_token: experts that process each token.
        noise: standard deviation of what is added to each number of an expert, in units of the standard deviation of
            its tensor.
        seed: of the router and the noise.
    """

    experts: int
    experts_per_token: int = 2
    noise: float = 0.0
    seed: int = 1234

    def problems(self) -> list[str]:
        """Impossible settings, one line each."""
        chosen = f"--experts-per-token = {self.experts_per_token}"
        return [
            line
            for wrong, line in [
                (self.experts < 2, f"--upcycle-experts = {self.experts}: a mixture has at least 2 experts"),
                (
                    self.experts_per_token < 2,
                    f"{chosen}: the weights of the chosen experts add up to 1, so a single expert would always have "
                    f"weight 1 and its router would learn nothing: use 2 or more",
                ),
                (
                    self.experts_per_token > self.experts >= 2,
                    f"{chosen} is over --upcycle-experts = {self.experts}: use 2 to {self.experts}",
                ),
                (
                    not (math.isfinite(self.noise) and self.noise >= 0),
                    f"--noise = {self.noise} must be a finite number from 0",
                ),
            ]
            if wrong
        ]


def asked_for(
    experts: int | None, *, experts_per_token: int | None, noise: float | None, seed: int | None
) -> Upcycling | None:
    """What the options of a command ask for; None where they ask for no mixture.

    Raises:
        ConfigError: details of a mixture that is not asked for.
    """
    given = {"experts_per_token": experts_per_token, "noise": noise, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    if experts is not None:
        return Upcycling(experts, **given)
    if given:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError([f"{options}: only for upcycling: add --upcycle-experts, or leave out"])
    return None


def mixture_of(model: ModelConfig, upcycling: Upcycling) -> ModelConfig:
    """The `model` section of the mixture.

    Args:
        model: of the dense model.

    Raises:
        ConfigError: numbers that cannot be, a mixture already, or one that no model of transformers computes.
    """
    if model.num_moe_experts is not None:
        raise ConfigError([
            f"the model is a mixture of {model.num_moe_experts} experts already: import it without --upcycle-experts"
        ])  # fmt: skip
    if problems := upcycling.problems():
        raise ConfigError(problems)
    shape = {
        "num_moe_experts": upcycling.experts,
        "moe_router_topk": upcycling.experts_per_token,
        "moe_ffn_hidden_size": model.ffn_size,
        "moe_aux_loss_coeff": BALANCE,
        "export_as": None,
    }
    if model.add_qkv_bias:
        shape |= {"moe_shared_expert_intermediate_size": model.ffn_size, "moe_shared_expert_gate": True}
    mixture = model.model_copy(update=shape)
    computing = families_of(mixture)
    if not computing:
        raise ConfigError([f"{line}: it stays dense, without --upcycle-experts" for line in refusals(mixture)])
    return mixture.model_copy(update={"export_as": computing[0]})


def description(mixture: ModelConfig) -> str:
    """A line about the result."""
    shared = ", and a shared expert whose output is 0 at first" if mixture.moe_shared_expert_intermediate_size else ""
    return (
        f"{mixture.num_moe_experts} experts in each layer; experts for each token: {mixture.moe_router_topk}{shared}; "
        f"training uses model.moe_aux_loss_coeff = {mixture.moe_aux_loss_coeff:g}"
    )


@torch.no_grad()
def read_upcycled(
    chunks: list[torch.nn.Module],
    weights: SafetensorsFolder,
    dense: ModelConfig,
    mixture: ModelConfig,
    upcycling: Upcycling,
    *,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fill the chunks of a mixture, on one rank, from the weights of the dense model.

    Args:
        chunks: bare model chunks of `mixture`.
        weights: what `open_weights` gave for `dense`.
        advance: told parameters done and in all, after each.
    """
    todo = [named for chunk in chunks for named in canonical_parameters(chunk)]
    arrangement = arrangement_of(weights)
    # Two streams, so that routers are the same with and without noise.
    routers, noises = (torch.Generator().manual_seed(upcycling.seed + stream) for stream in range(2))
    for number, (name, parameter) in enumerate(todo, start=1):
        layer, rest = layer_of(name)
        if rest == ROUTER:
            parameter.copy_(torch.randn(parameter.shape, generator=routers) * mixture.init_method_std)
        elif rest in (SHARED_GATE, f"{_SHARED}linear_fc2.weight"):
            parameter.zero_()
        else:
            copy_parameter(parameter, _dense_name(layer, rest, name), weights, dense, arrangement)
            if is_expert(name) and upcycling.noise > 0:
                _disturb(parameter, upcycling.noise, noises)
        advance(number, len(todo))


def _dense_name(layer: int | None, rest: str, name: str) -> str:
    """The parameter of the dense model that one of the mixture starts as."""
    if is_expert(name) or rest.startswith(_SHARED):
        return f"decoder.layers.{layer}.mlp.{rest.split('.')[-2]}.weight"
    return name


def _disturb(parameter: Tensor, noise: float, generator: torch.Generator) -> None:
    wide = parameter.float()
    drawn = torch.randn(parameter.shape, generator=generator).to(wide.device)
    parameter.copy_(wide + drawn * (noise * wide.std(correction=0)))
