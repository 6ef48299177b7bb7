"""What a step tells beside its loss: traffic of context parallelism, and the work of a GPU."""

from __future__ import annotations

import torch

from moba_megatron.config import Config
from moba_megatron.parallel.wire import Observation
from moba_megatron.planning.flops import peak_flops, training_flops_per_token
from moba_megatron.training.preflight import Preflight


def gpu_metrics(config: Config, ready: Preflight, stage: int, seconds: float) -> dict[str, float]:
    """Operations per second of a GPU, their share of its peak where that is known, and memory.

    Args:
        stage: of the attention schedule.
        seconds: that the step took.
    """
    layers = [None if a.kind == "full" else (a.block_size, a.top_k) for a in ready.schedule.stages[stage]]
    per_token = training_flops_per_token(config, ready.vocab_size, layers)
    flops = per_token * config.tokens_per_step / seconds / ready.world_size
    metrics = {"tflops": flops / 1e12}
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
