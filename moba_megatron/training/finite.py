"""Values of a step that are not finite: which microbatches, gradients and weights, by the names that a person knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moba_megatron.checkpoint import NotFinite
from moba_megatron.checkpoint.finite import is_finite, list_of_names, weights_not_finite
from moba_megatron.config import Config
from moba_megatron.data.batches import rank_samples
from moba_megatron.training.data_position import DataPosition

# Names in a record; a step that diverged late has all of them.
MOST_NAMES = 12


def readable_names(model: list[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of this rank's chunks, each with its name, `layer 3.self_attention.linear_proj.weight` in a layer:
    layers counted from 1 over the whole model, where megatron-core counts from 0 on each pipeline stage."""
    for chunk in model:
        numbers = {
            name: module.layer_number
            for name, module in chunk.named_modules()
            if re.fullmatch(r".*\.layers\.\d+", name) and hasattr(module, "layer_number")
        }
        for name, parameter in chunk.named_parameters():
            layer = re.match(r".*?\.layers\.\d+", name)
            known = layer and layer[0] in numbers
            yield (f"layer {numbers[layer[0]]}{name[layer.end() :]}" if known else name), parameter


def first_sample(position: DataPosition, config: Config, step: int) -> int:
    """Number of the first sample of a step, in the present order of samples."""
    return position.after(step - 1, config).in_order


def samples_of_rank(
    config: Config, position: DataPosition, step: int, data_parallel_rank: int, data_parallel: int
) -> list[list[int]]:
    """Sample numbers of each microbatch that a data-parallel rank takes in a step."""
    first, micro = first_sample(position, config, step), config.training.micro_batch_size
    stream = rank_samples(first, first + config.training.global_batch_size, micro, data_parallel_rank, data_parallel)
    return [[number for number in numbers if number is not None] for numbers in stream]


def rank_facts(model: list[torch.nn.Module], sums: list[Tensor], samples: list[list[int]]) -> dict[str, Any]:
    """The values of this rank that are not finite.

    Args:
        sums: loss sum and token count of each microbatch on the last pipeline stage, empty elsewhere.
        samples: of each microbatch.

    Returns:
        `rank`; `loss`, the samples of the microbatches whose loss is not finite; `gradients` (as the ranks have added
        them up) and `weights`, names of parameters; `more`, how many names were left out.
    """
    named = list(readable_names(model))
    gradients = [name for name, p in named if getattr(p, "main_grad", None) is not None and not is_finite(p.main_grad)]
    weights = [name for name, p in named if not is_finite(p.detach())]
    return {
        "rank": torch.distributed.get_rank(),
        "loss": [n for total, numbers in zip(sums, samples, strict=False) if not is_finite(total) for n in numbers],
        "gradients": gradients[:MOST_NAMES],
        "weights": weights[:MOST_NAMES],
        "more": max(len(gradients) - MOST_NAMES, 0) + max(len(weights) - MOST_NAMES, 0),
    }


def refuse_weights(model: list[torch.nn.Module], step: int) -> None:
    """Raise NotFinite on every rank if the update of a step left weights that are not finite. Collective."""
    if names := weights_not_finite(model):
        raise NotFinite(
            f"step {step}: the update left weights that are not finite: {list_of_names(names)}. Lower "
            "optimizer.lr, lengthen optimizer.warmup_steps, or look at this step's data",
            step=step,
        )


def gathered(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of all ranks, on all ranks. Collective."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, facts)
    return found


def number_for_json(value: float | None) -> float | str | None:
    """JSON knows no `nan` and no `inf`: they become strings.

    >>> number_for_json(1.5), number_for_json(float("inf"))
    (1.5, 'inf')
    """
    return value if value is None or torch.isfinite(torch.tensor(value)) else str(value)
