"""The model that answers the tasks: that of a checkpoint or of a Hugging Face folder, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from moba_megatron.config import Config
from moba_megatron.corpus.tokenizer import Tokenizer, text_start
from moba_megatron.evaluation.attention_choice import chosen_attentions
from moba_megatron.evaluation.subject import Subject
from moba_megatron.evaluation.tasks.opened_model import OpenedTaskModel
from moba_megatron.evaluation.tasks.scoring import TaskModel
from moba_megatron.evaluation.tasks.shares import Share
from moba_megatron.generation.loading import load_huggingface, load_tokenizer, load_training_tokenizer
from moba_megatron.hf import NAME
from moba_megatron.hf.probe import has_moba_layers
from moba_megatron.runs.folder import RunFolder


@dataclass(frozen=True)
class Asked:
    """A model that tasks are put to.

    Attributes:
        title: of its table.
        folder: where results go.
        step, tokens: of training, at its checkpoint; None for a model without a known history.
        config: of its run, for the trackers.
        tokenizer: its own.
        window: tokens that it can take, and what says so.
        usual: tokens that it is asked with where nothing is said: these, and halves of them.
        template: tokens that it gets before every prompt, as in generation (one for the beginning of a text, or none).
        attentions: how it shall attend, in this order.
        attend: the model, attending so from now on.
        share: of the samples, that this rank scores.
    """

    title: str
    folder: RunFolder
    step: int | None
    tokens: int | None
    config: Config | None
    tokenizer: Tokenizer
    window: tuple[int, str]
    usual: int
    template: int
    attentions: Sequence[str]
    attend: Callable[[str], TaskModel]
    share: Share = Share()


@dataclass(frozen=True)
class WithTemplate:
    """A model that gets the same ids before every prompt."""

    model: TaskModel
    before: list[int]

    def last_logits(self, ids: list[int], last: int) -> Tensor:
        return self.model.last_logits([*self.before, *ids], last)


class HuggingFaceTaskModel:
    """A causal language model of transformers."""

    def __init__(self, model: Any):
        self._model = model

    @torch.no_grad()
    def last_logits(self, ids: list[int], last: int) -> Tensor:
        tokens_1S = torch.tensor([ids], device=self._model.device)
        return self._model(tokens_1S, use_cache=False, logits_to_keep=last).logits[0].float()


def from_subject(subject: Subject) -> Asked:
    """The model of a run or checkpoint folder. Usual is what it was trained on: rows of `data.sequence_length`.

    Raises:
        ValueError: experts shared by ranks with different prompts, under a dispatcher that needs equal lengths.
    """
    parallel = subject.config.parallel
    if parallel.expert > 1 and subject.data_parallel > 1 and parallel.expert_dispatcher == "allgather":
        raise ValueError(
            "--tasks: parallel.expert_dispatcher = allgather gathers prompts of equal length only, but "
            f"{parallel.expert} expert-parallel ranks score different samples on {subject.data_parallel} data-parallel "
            "ranks: evaluate on one process, or with --parallel tensor=N or context=N alone"
        )
    tokenizer = Tokenizer(subject.config.data.tokenizer)
    before = text_start(load_training_tokenizer(tokenizer.folder, tokenizer.eod_token))

    def attend(attention: str) -> TaskModel:
        subject.attend(attention)
        return WithTemplate(OpenedTaskModel(subject.opened), before)

    return Asked(
        title=f"{subject.folder}, step {subject.step}",
        folder=subject.folder,
        step=subject.step,
        tokens=subject.tokens,
        config=subject.config,
        tokenizer=tokenizer,
        window=(subject.config.window, "the larger of data.sequence_length and model.max_position_embeddings"),
        usual=subject.config.data.sequence_length,
        template=len(before),
        attentions=subject.attentions,
        attend=attend,
        share=Share(
            parallel_state.get_data_parallel_rank(),
            subject.data_parallel,
            parallel_state.get_data_parallel_group(),
            in_step=subject.config.parallel.expert > 1,
            device=subject.opened.device,
        ),
    )


def from_huggingface(folder: Path, attention: str | None, output: Path | None = None, *, verify: bool = True) -> Asked:
    """The model of a Hugging Face folder, where results go, too, unless `output` is another one.

    Args:
        attention: `moba`, `full` or `both`; None: both, if the model has MoBA layers.
        verify: as for `load_huggingface`.

    Raises:
        ValueError: an attention that the model does not have, one that would be ignored, or damaged weights.
        OSError: no weights or no tokenizer.
    """
    model, _ = load_huggingface(folder, verify=verify)
    before = text_start(load_tokenizer(folder))

    def attend(kind: str) -> TaskModel:
        model.set_attn_implementation(NAME if kind == "moba" else "sdpa")
        return WithTemplate(HuggingFaceTaskModel(model), before)

    return Asked(
        title=str(folder),
        folder=RunFolder(output or folder),
        step=None,
        tokens=None,
        config=None,
        tokenizer=Tokenizer(folder),
        window=(model.config.max_position_embeddings, "max_position_embeddings"),
        usual=model.config.max_position_embeddings,
        template=len(before),
        attentions=chosen_attentions(attention, has_moba_layers(model)),
        attend=attend,
    )
