"""Settings of a layer spec besides the caller's own flags: `MOBA_CONFIG` and `MOBA_STAGE`, or a keyword.

They are environment variables, because Megatron-LM's flags cannot be extended without a change to its script.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moba_megatron.config import AttentionConfig, AttentionFile, ConfigError, attention_checks, load_attention
from moba_megatron.model.schedule import AttentionSchedule, without_effect

CONFIG_VARIABLE = "MOBA_CONFIG"
STAGE_VARIABLE = "MOBA_STAGE"

Attention = str | Path | Mapping[str, Any] | AttentionConfig


@dataclass(frozen=True)
class AttentionPlan:
    """How the layers of a model attend, and what computes it."""

    schedule: AttentionSchedule
    stage: int
    """The stage of the schedule that the model is built for, counted from 0."""
    file: AttentionFile

    @property
    def settings(self) -> dict[str, Any]:
        """Keywords of `model.specs.with_schedule`."""
        attention, exchange = self.file.attention, self.file.exchange
        return {
            "stage": self.stage,
            "backend": attention.backend,
            "full_backend": attention.full_backend,
            "exchange": {"moba": exchange.moba, "full": exchange.full},
            "workspace_bytes": attention.workspace_bytes,
            "key_convolution": attention.key_convolution,
        }

    def __str__(self) -> str:
        attention, exchange = self.file.attention, self.file.exchange
        lines = [self.schedule.table()]
        if len(self.schedule.stages) > 1:
            lines.append(f"this run: stage {self.stage + 1}")
        lines.append(
            f"backend {attention.backend}, full_backend {attention.full_backend}, exchange of MoBA layers "
            f"{exchange.moba}, of full layers {exchange.full}"
        )
        return "\n".join(lines)


def attention_plan(
    given: Attention | None, layers: int, length: int | None, kv_heads: int | None = None
) -> AttentionPlan:
    """The plan for a model, printed by rank 0 the first time.

    Args:
        given: the keyword of a spec: a file, a dictionary or a section. Default: the file that `MOBA_CONFIG` names,
            which must say the same on all ranks.
        layers: attention layers of the whole model.
        length: tokens of a sequence, where the caller knows.
        kv_heads: key heads of a layer, where the caller knows.

    Raises:
        ConfigError: no settings, settings that cannot work, a schedule of several stages without `MOBA_STAGE`, or
            another plan than that of another rank.
    """
    source = given if given is not None else os.environ.get(CONFIG_VARIABLE)
    if not source:
        raise ConfigError([
            f"no attention settings: set {CONFIG_VARIABLE} to a YAML file with the section `attention`, or give them "
            "to the spec (`attention=`) or the command (`--attention`)"
        ])  # fmt: skip
    file = load_attention(source)
    keys = ("num_layers", "seq_length", "num_query_groups")
    checks = attention_checks(file.attention, layers, length, kv_heads, keys=keys)
    problems = [text for wrong, text in checks if wrong]
    if file.attention.router != "own":
        problems.append(
            f"attention.router = {file.attention.router}: its loss needs the loss mask of each batch, which only "
            "train.py hands to the layers: train there, or use own"
        )
    if problems:
        raise ConfigError(problems)
    try:
        schedule = AttentionSchedule.from_config(file.attention, layers)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    if unused := without_effect(file.attention, schedule):
        raise ConfigError(unused)
    plan = AttentionPlan(schedule, _stage(schedule), file)
    if given is None:
        _refuse_another_plan_than_other_ranks(plan)
    print_once(f"MoBA from {Path(source).resolve() if isinstance(source, str | Path) else 'the script'}\n{plan}")
    return plan


@functools.cache
def plan_of_environment(config: str | None, stage: str | None, layers: int, length: int | None) -> AttentionPlan:
    """`attention_plan(None, layers, length)`, read once: a model is built layer by layer, and a file may change.

    Args:
        config, stage: `MOBA_CONFIG` and `MOBA_STAGE`.
    """
    return attention_plan(None, layers, length)


def _refuse_another_plan_than_other_ranks(plan: AttentionPlan) -> None:
    """Compare the plan with the first one that any rank had. It uses the store of the process group, because not every
    rank builds a layer and comes here."""
    if not torch.distributed.is_initialized():
        return
    ours = str(plan)
    store = torch.distributed.distributed_c10d._get_default_store()
    first = store.compare_set(f"moba_attention_plan_{plan.schedule.num_layers}", "", ours).decode()
    if first != ours:
        raise ConfigError([
            f"rank {torch.distributed.get_rank()} and another rank have different attention settings: "
            f"{CONFIG_VARIABLE} and {STAGE_VARIABLE} must be the same on all nodes.\nhere:\n{ours}\nthere:\n{first}"
        ])  # fmt: skip


def _stage(schedule: AttentionSchedule) -> int:
    """The stage that `MOBA_STAGE` names, counted from 0."""
    given, count = os.environ.get(STAGE_VARIABLE), len(schedule.stages)
    if given is None:
        if count > 1:
            raise ConfigError([
                f"the schedule has {count} stages, and nothing here changes from one to the next: set {STAGE_VARIABLE} "
                f"to the one that is meant, 1 to {count}"
            ])  # fmt: skip
        return 0
    if not given.isdecimal() or not 1 <= int(given) <= count:
        raise ConfigError([f"{STAGE_VARIABLE} = {given!r}: give a stage of the schedule, 1 to {count}"])
    return int(given) - 1


@functools.cache
def print_once(text: str) -> None:
    """Print on rank 0, the same text only once."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(text, flush=True)
