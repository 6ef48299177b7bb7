"""How a model does on samples: by likelihood and by greedy match, without generating.

Likelihood: nats per token of the right target, and whether it is more likely than each distractor. Greedy match:
whether the most likely token is right at every place of the target while the target is fed. That is so exactly if
greedy decoding, with the attention of this pass, says the target.

Candidates that differ in their last token only share one forward pass: numbers of one token cost one pass in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moba_megatron.evaluation.tasks.sample import Sample, TaskTokenizer
from moba_megatron.generation.loading import OpenedModel


class TaskModel(Protocol):
    """What scoring asks of a model."""

    def last_logits(self, ids: list[int], last: int) -> Tensor:
        """Logits [last, vocabulary] after each of the last tokens of one sequence."""


@dataclass(frozen=True)
class SampleScore:
    """One sample.

    Attributes:
        answer_nats: mean negative log-likelihood of the target's tokens.
        ranked_first: whether no distractor is as likely, over all its tokens, as the target; None without distractors.
        greedy_match: whether greedy decoding says the target.
    """

    answer_nats: float
    ranked_first: bool | None
    greedy_match: bool


class OpenedTaskModel:
    """A checkpoint's model. Logits of a long prompt never exist: only the last hidden states reach the output layer.

    Args:
        opened: one rank, one model chunk.
    """

    def __init__(self, opened: OpenedModel):
        (self._model,) = opened.model
        self._device = opened.device

    @torch.no_grad()
    def last_logits(self, ids: list[int], last: int) -> Tensor:
        tokens_1S = torch.tensor([ids], device=self._device)
        positions_1S = torch.arange(len(ids), device=self._device)[None]
        with _last_only(self._model.output_layer, last):
            logits_1LV = self._model(tokens_1S, positions_1S, attention_mask=None)
        return logits_1LV[0, :, : self._model.unpadded_vocab_size].float()


@contextmanager
def _last_only(output_layer: torch.nn.Module, last: int) -> Iterator[None]:
    """Let an output layer see the last `last` hidden states [s, b, h] only."""

    def cut(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_SBH, *rest = arguments
        return (hidden_SBH[-last:], *rest)

    hook = output_layer.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        hook.remove()


def score_sample(model: TaskModel, tokenizer: TaskTokenizer, sample: Sample) -> SampleScore:
    """Score one sample. The prompt and each target are encoded by themselves, then joined."""
    prompt, target, *wrong = tokenizer.encode_batch([sample.prompt, sample.target, *sample.distractors])
    likelihoods, logits_LV = _likelihoods(model, prompt, [target, *wrong])
    greedy = logits_LV.argmax(dim=-1).tolist() == target
    first = likelihoods[0] > max(likelihoods[1:]) if wrong else None
    return SampleScore(-likelihoods[0] / len(target), first, greedy)


def _likelihoods(model: TaskModel, prompt: list[int], candidates: list[list[int]]) -> tuple[list[float], Tensor]:
    """The log-likelihood of each candidate after the prompt, and the logits [tokens, vocabulary] under the first."""
    logits_of: dict[tuple[int, ...], Tensor] = {}
    totals = []
    for candidate in candidates:
        start = tuple(candidate[:-1])
        if start not in logits_of:
            logits_of[start] = model.last_logits([*prompt, *start], len(candidate))
        log_LV = logits_of[start].log_softmax(dim=-1)
        chosen_L1 = torch.tensor(candidate, device=log_LV.device)[:, None]
        totals.append(float(log_LV.gather(1, chosen_L1).sum()))
    return totals, logits_of[tuple(candidates[0][:-1])]
