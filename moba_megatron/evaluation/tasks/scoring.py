"""Scores of a model on samples: by likelihood and by greedy match, without generation.

Likelihood: nats per token of the right target, and whether it is more likely than each distractor. Greedy match: with
the target as input, the most likely token is right at every place of the target. This is equivalent to greedy decoding
of the target with the attention of this pass.

Candidates that differ only in their last token share one forward pass: numbers of one token need one pass in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moba_megatron.evaluation.tasks.sample import Sample, TaskTokenizer


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
