"""An estimate of whether an evaluation fits into memory, printed before the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moba_megatron.config import Config
from moba_megatron.evaluation.attention_choice import Attention
from moba_megatron.model.schedule import FULL, AttentionSchedule
from moba_megatron.planning.memory_evaluation import evaluation_memory

GIB = 2**30


def memory_lines(
    config: Config,
    schedule: AttentionSchedule,
    attentions: Sequence[Attention],
    vocab_size: int,
    ranks: int,
    device: torch.device,
) -> list[str]:
    """What is expected, where there are several ranks; and everywhere that it is more than the device has.

    Args:
        config: with the layout of the evaluation.
        schedule: of the run; the dearest of its stages counts.
        attentions: that the layers shall attend by.
        vocab_size: entries of the vocabulary, without padding.
    """
    ways = [
        *(schedule.stages if "moba" in attentions else []),
        *[(FULL,) * schedule.num_layers] * ("full" in attentions),
    ]
    found = [evaluation_memory(config, layers, vocab_size, device.type) for layers in ways]
    needed = max(found, key=lambda memory: memory.total)
    parallel, lines = config.parallel, []
    if ranks > 1:
        sizes = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
        sizes += f", expert {parallel.expert}" if parallel.expert > 1 else ""
        lines.append(
            f"{ranks} ranks: {sizes}, {ranks // parallel.model_ranks} data-parallel; memory of a rank at "
            f"{config.data.sequence_length:,} tokens (estimate): {needed.weights / GIB:.2f} GiB of weights, "
            f"{needed.working / GIB:.2f} GiB at work"
        )
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    if there is not None and needed.total > there:
        lines.append(
            f"this needs about {needed.total / GIB:.1f} GiB, and the GPU has {there / GIB:.1f}: split the model or the "
            "sequence over more processes (torchrun, --parallel)"
        )
    return lines
