"""The subject of `moba-megatron evaluate`: a trained model, the ways it can attend, and its validation data.

Every part of the command gets the same `Subject`. The weights are loaded once; `attend` switches all layers between
MoBA and full attention of these weights, as a stage of the attention schedule would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from megatron.core import parallel_state

from moba_megatron.checkpoint.find import find_checkpoint, saved_layout
from moba_megatron.checkpoint.manifest import Manifest
from moba_megatron.config import Config
from moba_megatron.convert.indexes import Indexes
from moba_megatron.convert.run_inputs import found_config
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.data.datasets import ValidationSummary, build_validation, check_validation
from moba_megatron.data.feed import rank_batches
from moba_megatron.evaluation.attention_choice import Attention, chosen_attentions
from moba_megatron.evaluation.layout import evaluation_layout
from moba_megatron.evaluation.memory import memory_lines
from moba_megatron.generation.loading import OpenedModel, open_model
from moba_megatron.model.block_router import block_routers
from moba_megatron.model.core_attention import set_attention_stage
from moba_megatron.model.forward import Batch
from moba_megatron.model.schedule import FULL, AttentionSchedule, LayerAttention, kind_of
from moba_megatron.platform import current_device
from moba_megatron.platform.command_ranks import command_ranks
from moba_megatron.platform.process_groups import start_process_group
from moba_megatron.runs.folder import RunFolder


@dataclass
class Subject:
    """An opened model and what to evaluate it on.

    Attributes:
        opened: the model, in evaluation mode.
        config: the run's configuration, with the data and numbers of samples asked for, one sample a pass.
        attentions: how the parts shall let it attend, in this order.
        own_length: the run's own `data.sequence_length`, in tokens.
        output: where results go; None: to the run folder.
    """

    opened: OpenedModel
    config: Config
    attentions: list[Attention]
    own_length: int
    output: Path | None = None

    @property
    def data_parallel(self) -> int:
        """Ranks, or groups of them, that look at different samples at the same time."""
        return parallel_state.get_data_parallel_world_size()

    @property
    def step(self) -> int:
        return self.opened.step

    @property
    def tokens(self) -> int:
        """Tokens that training had read at this step."""
        return Manifest.read(self.opened.checkpoint).tokens

    @property
    def folder(self) -> RunFolder:
        """Where results go: the run folder, unless another one is asked for."""
        return self.opened.folder if self.output is None else RunFolder(self.output)

    @property
    def other_length(self) -> str | None:
        """The length of the samples, as `L=2048`, where it is not the run's own."""
        length = self.config.data.sequence_length
        return None if length == self.own_length else f"L={length}"

    @property
    def own_attention(self) -> Attention:
        """How the model attended at its last training step: `moba` if any layer did."""
        return kind_of(_own_layers(self.opened))

    def attend(self, attention: Attention | tuple[LayerAttention, ...], *, by_index: bool = True) -> None:
        """Let the layers attend so from now on; the parameters stay the same.

        Args:
            by_index: whether an index chooses in the layers that have one.
        """
        layers = attention if isinstance(attention, tuple) else self.layers_of(attention)
        set_attention_stage(self.opened.model, AttentionSchedule((layers,)), 0)
        for router in block_routers(self.opened.model):
            router.set_aside = not by_index

    @cached_property
    def indexed_layers(self) -> frozenset[int]:
        """Layers that have an index to choose blocks, from 0."""
        found = Indexes.of_config(self.config.attention, self.opened.schedule)
        return frozenset() if found is None else found.layers

    def layers_of(self, attention: Attention) -> tuple[LayerAttention, ...]:
        """How each layer attends then."""
        layers = attention_layers(self.opened, attention)
        assert layers is not None, "open_subject offers only attentions that there are"
        return layers

    @cached_property
    def validation(self) -> ValidationSummary:
        """What the validation data are.

        Raises:
            ConfigError: there are none, or they do not fit the model.
        """
        return check_validation(self.config)

    def batches(self, samples: int) -> Iterator[Batch]:
        """The first samples of the validation data, the same in every evaluation, one a batch: this rank's part of
        them. Every data-parallel rank gets the next one; where the last are missing, one without a loss.

        Raises:
            ConfigError: there are not so many.
        """
        evaluation = self.config.evaluation.model_copy(update={"samples": samples})
        config = self.config.model_copy(update={"evaluation": evaluation})
        check_validation(config)
        return rank_batches(
            build_validation(config),
            config,
            eod_id=self.validation.eod_id,
            consumed_samples=0,
            num_samples=samples,
            device=self.opened.device,
        )


def open_subject(
    target: Path,
    *,
    attention: str | None = None,
    validation: str | None = None,
    samples: int | None = None,
    trailing_tokens: int | None = None,
    sequence_length: int | None = None,
    on_validation: bool = True,
    output: Path | None = None,
    verify: bool = True,
    parallel: str | None = None,
    asked_for: Mapping[str, int | None] | None = None,
    say: Callable[[str], object] | None = None,
) -> Subject:
    """Load the model of a run or checkpoint folder into this process, or this rank's part of it. Collective.

    Args:
        attention: `moba`, `full` or `both`; None: both, if the model has MoBA layers in any stage of its schedule.
        validation: prefix of indexed data; None: the run's own.
        samples, trailing_tokens: in place of the run's `evaluation.samples` and `evaluation.trailing_tokens`.
        sequence_length: of these samples, in tokens, in place of the run's `data.sequence_length`.
        on_validation: whether validation data are needed; they are checked before the model is loaded.
        output: where results go; None: to the run folder.
        verify: as for `open_model`.
        parallel: as for `evaluation_layout`.
        asked_for: how many samples each option will ask `batches` for; None: `evaluation.samples`. Not fewer than
            data-parallel ranks.
        say: told what memory is expected, before the model is loaded.

    Raises:
        CheckpointError: no complete checkpoint there, or not one for this tokenizer.
        ValueError: an attention that the model does not have, a bad number, validation data that are missing or do not
            fit, or a layout that does not.
    """
    target = _same_everywhere(find_checkpoint(target))
    own = found_config(target)
    config = _asked_for(own, validation, samples, trailing_tokens, sequence_length)
    layout = evaluation_layout(config, saved_layout(target), parallel, command_ranks())
    config = config.model_copy(update={"parallel": layout})
    _check_enough(config, command_ranks(), asked_for or {})
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    has_moba = "moba" in map(kind_of, schedule.stages)
    attentions = chosen_attentions(attention, has_moba)
    if on_validation:
        if config.data.validation is None:
            raise ValueError(f"{target} has no data.validation: name data with --validation")
        check_validation(config)
    tokenizer = Tokenizer(config.data.tokenizer)
    if say is not None:
        vocab_size = config.model.vocab_size or tokenizer.vocab_size
        for line in memory_lines(config, schedule, attentions, vocab_size, command_ranks(), current_device()):
            say(line)
    opened = open_model(target, tokenizer.fingerprint, tokenizer.vocab_size, verify=verify, parallel=layout)
    own_length = own.data.sequence_length
    subject = Subject(replace(opened, config=config), config, attentions, own_length, output)
    # The model's own way first: its results are what training recorded.
    subject.attentions.sort(key=lambda name: name != subject.own_attention)
    return subject


def _check_enough(config: Config, ranks: int, asked_for: Mapping[str, int | None]) -> None:
    """Refuse fewer samples than there are data-parallel ranks: some would have nothing of their own to do."""
    data_parallel = ranks // config.parallel.model_ranks
    for option, asked in asked_for.items():
        samples = config.evaluation.samples if asked is None else asked
        if samples < data_parallel:
            raise ValueError(
                f"{samples} samples for {data_parallel} data-parallel ranks: start fewer processes, split the model or "
                f"the sequence over more of them (--parallel), or ask for more samples ({option})"
            )


def _same_everywhere(checkpoint: Path) -> Path:
    """The checkpoint that rank 0 found: a training that goes on may have added one meanwhile."""
    if command_ranks() == 1:
        return checkpoint
    if not torch.distributed.is_initialized():
        start_process_group()
    found = [checkpoint]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def attention_layers(opened: OpenedModel, attention: Attention) -> tuple[LayerAttention, ...] | None:
    """How each layer attends under `moba` or `full`; None if the model has no MoBA layers.

    `moba` is the stage of the checkpoint; if that stage is all full, the last one before it with MoBA layers, else the
    first one after it.
    """
    if attention == "full":
        return (FULL,) * opened.schedule.num_layers
    stages, own = opened.schedule.stages, _own_stage(opened)
    nearest = [*reversed(stages[: own + 1]), *stages[own + 1 :]]
    return next((layers for layers in nearest if kind_of(layers) == "moba"), None)


def _asked_for(
    config: Config,
    validation: str | None,
    samples: int | None,
    trailing_tokens: int | None,
    sequence_length: int | None,
) -> Config:
    length = sequence_length or config.data.sequence_length
    if trailing_tokens is not None and not 1 <= trailing_tokens <= length:
        raise ValueError(f"{trailing_tokens} trailing tokens: 1 to the {length} of a sample")
    changes = {"samples": samples, "trailing_tokens": trailing_tokens}
    own_trailing = config.evaluation.trailing_tokens
    if trailing_tokens is None and own_trailing is not None and own_trailing > length:
        raise ValueError(f"evaluation.trailing_tokens = {own_trailing} of the run is over {length}: give --trailing")
    evaluation = config.evaluation.model_copy(update={key: value for key, value in changes.items() if value})
    data = config.data.model_copy(
        update={"validation": validation or config.data.validation, "sequence_length": length}
    )
    training = config.training.model_copy(update={"micro_batch_size": 1})
    return config.model_copy(update={"data": data, "evaluation": evaluation, "training": training})


def _own_stage(opened: OpenedModel) -> int:
    return opened.schedule.stage_at(max(opened.step, 1), opened.config.training.steps)


def _own_layers(opened: OpenedModel) -> tuple[LayerAttention, ...]:
    return opened.schedule.stages[_own_stage(opened)]
