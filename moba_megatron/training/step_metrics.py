"""The metrics of a step besides its loss: traffic of context parallelism, the load of experts, what an index learns,
and the work of a GPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moba_megatron.config import AttentionConfig, Config, ModelConfig
from moba_megatron.config.experts import LOSSES as BALANCING_LOSSES
from moba_megatron.model.experts import LOSSES
from moba_megatron.parallel.wire import Observation
from moba_megatron.planning.flops import peak_flops, training_flops_per_token
from moba_megatron.training.preflight import Preflight


def gpu_metrics(config: Config, ready: Preflight, stage: int, seconds: float) -> dict[str, float]:
    """Operations per second of a GPU, their share of its peak where that is known, and memory. Of the experts of a
    layer those count that a token is sent to.

    Args:
        stage: of the attention schedule.
        seconds: that the step took.
    """
    layers = [a.sizes for a in ready.schedule.stages[stage]]
    per_token = training_flops_per_token(config, ready.vocab_size, layers)
    flops = per_token * config.tokens_per_step / seconds / ready.world_size
    metrics: dict[str, float] = {"tflops": flops / 1e12}
    peak = peak_flops(torch.cuda.get_device_name()) if config.training.precision == "bf16" else None
    if peak:
        metrics["mfu"] = flops / peak
    return {**metrics, "peak_memory_bytes": torch.cuda.max_memory_allocated()}


def context_metrics(seen: Observation) -> dict[str, float]:
    """What this rank saw of context parallelism in a step: bytes received from other ranks, and under `dispatch` the
    load of the busiest rank over the mean, at its worst."""
    metrics: dict[str, float] = {"context_bytes": seen.total}
    loads = [load.most_after / load.mean for load in seen.loads if load.mean]
    return {**metrics, "dispatch_load": max(loads)} if loads else metrics


def index_metrics(sums: Tensor, attention: AttentionConfig) -> dict[str, Any]:
    """What the indexes that choose blocks learn, from what `model.block_router.read_index_tallies` gives.

    Returns:
        `router_loss`: what all layers add to the loss of the language model, with their weight. `routers`, for each
        layer with an index that learns: `layer` from 1, `loss` and `entropy` of the choice, in nats per token. Of a
        step without tokens, nothing.
    """
    layers = [
        {"layer": number, "loss": loss / tokens, "entropy": entropy / tokens}
        for number, (loss, entropy, tokens) in enumerate(sums.tolist(), start=1)
        if tokens > 0
    ]
    if not layers:
        return {}
    return {"router_loss": attention.router_loss_coeff * sum(layer["loss"] for layer in layers), "routers": layers}


def expert_metrics(sums: Tensor, model: ModelConfig) -> dict[str, Any]:
    """Auxiliary losses and the load of experts, from what `model.experts.read_tallies` gives.

    Returns:
        `aux_loss`: what all auxiliary losses add to the loss of the language model, over all layers and with their
        weights. `balance_loss` (1: even) and `z_loss`, means over the layers without weights, each where it has a
        weight. `experts`, for each layer with experts: `layer` from 1, `load` of the fullest expert over the mean,
        `dead` experts that got no token, `entropy` of the load over its largest, `dropped` share of what was to be
        sent. Of a step without tokens, nothing.
    """
    experts, layers = model.num_moe_experts or 0, [n for n, has in enumerate(model.expert_layers) if has]
    load_LE, tokens_L = sums[layers, :experts], sums[layers, experts]
    if not bool((tokens_L > 0).all()):
        return {}
    means = dict(zip(LOSSES, (sums[layers, experts + 1 :] / tokens_L[:, None]).unbind(1), strict=True))
    balanced = model.moe_router_load_balancing_type in BALANCING_LOSSES and model.moe_aux_loss_coeff > 0
    weights = {"balance_loss": model.moe_aux_loss_coeff if balanced else 0.0, "z_loss": model.moe_z_loss_coeff or 0.0}
    present = {name: weight for name, weight in weights.items() if weight > 0}
    metrics: dict[str, Any] = {}
    if present:
        metrics["aux_loss"] = sum(weight * float(means[name].sum()) for name, weight in present.items())
        metrics |= {name: float(means[name].mean()) for name in present}
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True).clamp(min=1.0)
    metrics["experts"] = [
        {
            "layer": layer + 1,
            "load": float(share.max()) * experts,
            "dead": int((load == 0).sum()),
            "entropy": float(torch.special.entr(share).sum() / math.log(experts)),
            "dropped": float(1 - load.sum() / (tokens * model.moe_router_topk)),
        }
        for layer, load, share, tokens in zip(layers, load_LE, share_LE, tokens_L, strict=True)
    ]
    return metrics
