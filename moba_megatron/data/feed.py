"""The input of a rank's model: the microbatches of its data-parallel rank, on its device, ready for the forward
step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state

from moba_megatron.config import Config
from moba_megatron.data.batches import Batch, microbatches, packed_seq_params
from moba_megatron.data.packing_datasets import KnownTokens


def rank_batches(
    dataset: Any, config: Config, *, eod_id: int, consumed_samples: int, num_samples: int, device: torch.device
) -> Iterator[Batch]:
    """Microbatches from sample `consumed_samples` on, up to `num_samples` in all, each with its `packed_seq_params`
    (None if it is not packed).

    Every rank of a model-parallel group reads the same batches; there is no broadcast. Context-parallel ranks read the
    same samples too, and keep their part of each.

    Raises:
        ConfigError: a sample with an id over the tokenizer's, as damaged files have; it names file and document.
    """
    parallel = config.parallel
    stream = microbatches(
        KnownTokens(dataset),
        consumed_samples=consumed_samples,
        num_samples=num_samples,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        device=device,
        eod_id=eod_id if config.packed else None,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel.context,
        tokens_multiple=parallel.tensor if parallel.sequence else 1,
    )
    for batch in stream:
        yield {**batch, "packed_seq_params": packed_seq_params(batch)}
