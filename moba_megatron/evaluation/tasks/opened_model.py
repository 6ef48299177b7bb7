"""The model of a checkpoint for the tasks, at any parallel layout.

Logits of a long prompt never exist: only the last hidden states reach the output layer. Context-parallel ranks have
different hidden states and tensor-parallel ranks different parts of the vocabulary, so the few rows of logits are added
over the ranks; the last pipeline stage sends them to the others. A prompt is padded at its end to a length that can be
cut. Attention is causal, so no token of the prompt sees the padding.

Legend: S tokens of the prompt with padding, L wanted rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from moba_megatron.data.batches import context_part
from moba_megatron.generation.loading import OpenedModel
from moba_megatron.model.forward import Batch, forward_only
from moba_megatron.parallel.layout import shard_positions


class OpenedTaskModel:
    """A checkpoint's model, this rank's part of it. Its method is collective over the ranks that share the model and
    the sequence, and with experts over several ranks also over those that share them.

    Args:
        opened: one model chunk.
    """

    def __init__(self, opened: OpenedModel):
        (self._model,) = opened.model
        self._device, self._parallel = opened.device, opened.config.parallel

    @torch.no_grad()
    def last_logits(self, ids: list[int], last: int) -> Tensor:
        """Logits [last, vocabulary] in fp32 after each of the last tokens of one sequence, the same on all ranks."""
        context, length = self._parallel.context, self._padded(len(ids))
        tokens_1S = torch.tensor([ids + ids[-1:] * (length - len(ids))], device=self._device)
        batch: Batch = {"tokens": tokens_1S, "position_ids": torch.arange(length, device=self._device)[None]}
        mine = torch.arange(length)
        if context > 1:
            rank = parallel_state.get_context_parallel_rank()
            batch, mine = context_part(batch, rank, context), shard_positions(torch.tensor([0, length]), context, rank)
        row_L, here_L = _places(mine, torch.arange(len(ids) - last, len(ids)))
        shape, split = {"seq_length": length, "micro_batch_size": 1}, self._parallel.sequence
        with _rows_only(self._model, row_L.to(self._device), split) as owner_row:
            found = forward_only([self._model], [iter([{**batch, "labels": None}])], 1, shape, _kept)
        logits_LV = torch.zeros(last, self._model.unpadded_vocab_size, device=self._device)
        if found:
            part_LV = found[0]["logits"][0][owner_row()].float()
            self._add(logits_LV, part_LV.masked_fill_(~here_L.to(self._device)[:, None], 0))
        if self._parallel.pipeline > 1:
            source, group = (
                parallel_state.get_pipeline_model_parallel_last_rank(),
                parallel_state.get_pipeline_model_parallel_group(),
            )
            dist.broadcast(logits_LV, src=source, group=group)
        return logits_LV

    def _padded(self, length: int) -> int:
        """The next length that the layout can cut."""
        tensor = self._parallel.tensor if self._parallel.sequence else 1
        unit = self._parallel.context * math.lcm(2, tensor) if self._parallel.context > 1 else tensor
        return -(-length // unit) * unit

    def _add(self, logits_LV: Tensor, part_LV: Tensor) -> None:
        """Put this rank's rows and columns in their places, and add up those of all ranks."""
        first = parallel_state.get_tensor_model_parallel_rank() * part_LV.shape[1]
        room = logits_LV[:, first : first + part_LV.shape[1]]
        # The last rank's columns may end in the padding of the vocabulary.
        room.copy_(part_LV[:, : room.shape[1]])
        if self._parallel.tensor > 1:
            dist.all_reduce(logits_LV, group=parallel_state.get_tensor_model_parallel_group())
        if self._parallel.context > 1:
            dist.all_reduce(logits_LV, group=parallel_state.get_context_parallel_group())


def _kept(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return logits.new_zeros(()), torch.ones((), dtype=torch.int), {"logits": logits}


def _places(mine: Tensor, wanted_L: Tensor) -> tuple[Tensor, Tensor]:
    """For each wanted position its row among those of this rank, which rise, and whether it is there at all; any row
    where it is not."""
    row_L = torch.searchsorted(mine, wanted_L).clamp(max=len(mine) - 1)
    return row_L, mine[row_L] == wanted_L


@contextmanager
def _rows_only(model: Any, row_L: Tensor, sequence_parallel: bool) -> Iterator[Any]:
    """Let the output layer, on the last pipeline stage, see some hidden states of [s, b, h] only.

    Under sequence parallelism the layer gathers what its ranks put in, so each puts in as many rows, its own or any.

    Yields:
        a function that says, afterwards, in which row of the logits each wanted one is.
    """
    place_L = torch.arange(len(row_L), device=row_L.device)

    def cut(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal place_L
        hidden_SBH, *rest = arguments
        own_L = row_L
        if sequence_parallel:
            tokens = hidden_SBH.shape[0]
            place_L = row_L // tokens * len(row_L) + place_L
            own_L = (row_L - parallel_state.get_tensor_model_parallel_rank() * tokens).clamp(0, tokens - 1)
        return (hidden_SBH[own_L], *rest)

    layer = model.output_layer if model.post_process else None
    hook = layer.register_forward_pre_hook(cut) if layer is not None else None
    try:
        yield lambda: place_L
    finally:
        if hook is not None:
            hook.remove()
