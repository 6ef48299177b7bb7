"""Steps whose loss or gradient is not finite, or whose loss spikes: their records, and the reaction to them.

All ranks decide before the update whether a step diverged. They use numbers that they share, so they all decide the
same. Runs repeat bit for bit: after going back to a checkpoint the same batch would diverge again. So it is left out,
and every later checkpoint names it. A step that is left out still counts: learning rate and data advance.

megatron-core's rerun state machine computes a step twice to separate faults of the hardware from those of the data. It
stays off: it makes none of the decisions here, and `training.replay` shows more of a step.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from moba_megatron.checkpoint import Manifest, find_latest
from moba_megatron.config import Config
from moba_megatron.data.origins import documents_of
from moba_megatron.runs.files import append_json_line, read_json_lines
from moba_megatron.runs.folder import RunFolder, trained_steps
from moba_megatron.training.data_position import DataPosition
from moba_megatron.training.faults import TrainingDiverged
from moba_megatron.training.finite import first_sample, number_for_json

_FEWEST_LOSSES = 20
# What a normal distribution's deviation is of its median absolute deviation.
_DEVIATION = 1.4826
# Least spread as a share of the median: a loss that hardly moves has no spikes of a thousandth.
_LEAST_SPREAD = 1e-3
_MOST_RANKS, _MOST_SAMPLES = 16, 64

_ADVICE = {
    "loss": "Lower optimizer.lr, or look at this step's data",
    "gradient norm": "Lower optimizer.lr, lengthen optimizer.warmup_steps, or look at this step's data",
    "spike": "Look at this step's data, or raise training.spike_threshold",
    "weights": "Lower optimizer.lr, lengthen optimizer.warmup_steps, or look at the data of the last steps",
}


class StepDiverged(Exception):
    """A step that must not change the weights, and has not. Raised on every rank.

    Args:
        kind: `loss` or `gradient norm`, the first of them that is not finite, or `spike`; `weights`, after an update.
        why: the same in words.
        grad_norm: before clipping.
    """

    def __init__(self, kind: str, why: str, loss: float | None, grad_norm: float | None):
        self.kind, self.why, self.loss, self.grad_norm = kind, why, loss, grad_norm
        super().__init__(why)

    @classmethod
    def of(cls, loss: float, grad_norm: float, spike: str | None) -> StepDiverged:
        """The first thing that is wrong with a step."""
        if not math.isfinite(loss):
            return cls("loss", f"the loss is {loss}", loss, grad_norm)
        if not math.isfinite(grad_norm):
            return cls("gradient norm", f"the gradient norm is {grad_norm}", loss, grad_norm)
        return cls("spike", spike or "another rank refused the update", loss, grad_norm)


class Spikes:
    """Compares each loss with the median of those before it, in units of their spread."""

    def __init__(self, threshold: float | None, window: int):
        self.threshold = threshold
        self.losses: deque[float] = deque(maxlen=window)

    def remember(self, losses: Iterable[float]) -> None:
        """Begin anew, with these as the last losses."""
        self.losses.clear()
        self.losses.extend(losses)

    def judge(self, loss: float) -> str | None:
        """The reason why a loss is a spike, or None.

        >>> spikes = Spikes(threshold=10, window=100)
        >>> spikes.remember([2.0, 2.1] * 10)
        >>> spikes.judge(2.3), spikes.judge(4.0)
        (None, 'the loss 4.0000 is 26.3 spreads over 2.0500, the median of the last 20')
        """
        if self.threshold is None or len(self.losses) < _FEWEST_LOSSES:
            return None
        median = statistics.median(self.losses)
        deviation = statistics.median(abs(before - median) for before in self.losses)
        spread = max(_DEVIATION * deviation, _LEAST_SPREAD * abs(median), 1e-12)
        far = (loss - median) / spread
        if far <= self.threshold:
            return None
        return f"the loss {loss:.4f} is {far:.1f} spreads over {median:.4f}, the median of the last {len(self.losses)}"


class SkippedBatches:
    """Steps whose batch is left out: those of the configuration, and those that a policy left out.

    Args:
        configured: `training.skip_batches`.
        recorded: as `checkpoint.json` has them: `step`, `samples` (first and last number, in the order of samples that
            holds then), `why`.
    """

    def __init__(self, configured: list[int], recorded: Iterable[dict[str, Any]]):
        self.configured = set(configured)
        self.recorded = {entry["step"]: entry for entry in recorded}

    def why(self, step: int) -> str | None:
        """Why a step's batch is left out; None if it is not."""
        if step in self.recorded:
            return self.recorded[step]["why"]
        return "training.skip_batches names it" if step in self.configured else None

    def add(self, step: int, why: str, config: Config, position: DataPosition) -> None:
        first = first_sample(position, config, step)
        samples = [first, first + config.training.global_batch_size - 1]
        self.recorded[step] = {"step": step, "samples": samples, "why": why}

    def entries(self) -> list[dict[str, Any]]:
        """For a checkpoint, by step."""
        return [self.recorded[step] for step in sorted(self.recorded)]


@dataclass(frozen=True)
class Answer:
    """The reaction to a step that diverged: `skip` or `rollback`, and the step whose batch is left out."""

    action: str
    blamed: int


class DivergencePolicy:
    """Decides by `training.on_divergence`, the same on every rank, and records the decision on one."""

    def __init__(self, config: Config, folder: RunFolder, dataset: Dataset, writes: bool):
        self.config, self.folder, self.dataset, self.writes = config, folder, dataset, writes
        self.count = 0

    def answer(
        self,
        step: int,
        diverged: StepDiverged,
        facts: list[dict[str, Any]],
        skipped: SkippedBatches,
        position: DataPosition,
    ) -> Answer:
        """Decide, and record it.

        Args:
            facts: of all ranks, see `finite.rank_facts`.

        Raises:
            TrainingDiverged: the run ends, with the reason.
        """
        training = self.config.training
        self.count += 1
        action, blamed, ends = training.on_divergence, step, ""
        spoilt = any(entry["weights"] for entry in facts)
        if spoilt or diverged.kind == "weights":
            # The batch before a step made them so, after a step its own; one that was left out has made nothing.
            newest = step if diverged.kind == "weights" else step - 1
            blamed = next(number for number in range(newest, -1, -1) if skipped.why(number) is None)
        if action == "stop":
            ends = f". {_ADVICE[diverged.kind]}"
        elif self.count > training.max_divergences:
            ends = f", after {training.max_divergences} others (training.max_divergences). {_ADVICE[diverged.kind]}"
        elif spoilt and action == "skip":
            ends = (
                f", and weights are not finite since step {blamed}, and leaving out a batch does not fix weights: use "
                "training.on_divergence=rollback"
            )
        self.record(step, diverged, "stop" if ends else action, position, facts, blamed)
        if ends:
            again = f"; for details run the same command with training.replay={step}"
            raise TrainingDiverged(f"step {step}: {diverged.why}{ends}{again}")
        return Answer(action, blamed)

    def record(
        self,
        step: int,
        diverged: StepDiverged,
        action: str,
        position: DataPosition,
        facts: list[dict[str, Any]] | None = None,
        blamed: int | None = None,
    ) -> None:
        """Add a line to `divergences.jsonl`, on the rank that writes."""
        if not self.writes:
            return
        wrong = [entry for entry in facts or [] if entry["loss"] or entry["gradients"] or entry["weights"]]
        first = first_sample(position, self.config, step)
        last = first + self.config.training.global_batch_size - 1
        suspects = sorted({number for entry in wrong for number in entry["loss"]}) or list(range(first, last + 1))
        append_json_line(
            self.folder.divergences,
            {
                "step": step,
                "kind": diverged.kind,
                "why": diverged.why,
                "loss": number_for_json(diverged.loss),
                "grad_norm": number_for_json(diverged.grad_norm),
                "action": action,
                "blamed_step": blamed if action in ("skip", "rollback") else None,
                "samples": [first, last],
                "ranks": wrong[:_MOST_RANKS],
                "ranks_in_all": len(wrong),
                "documents": [documents_of(self.dataset, number) for number in suspects[:_MOST_SAMPLES]],
                "suspects_in_all": len(suspects),
            },
        )


def last_losses(folder: RunFolder, window: int) -> list[float]:
    """The last losses on record."""
    return [line["loss"] for line in trained_steps(read_json_lines(folder.metrics))[-window:]]


def checkpoint_before(step: int, folder: RunFolder, resumed: Path | None) -> tuple[Path, int]:
    """The newest checkpoint of a run, which must be from before a step, and the step that it is from. Collective.

    Args:
        resumed: what the process resumed from, for a run that has none of its own yet.

    Raises:
        TrainingDiverged: there is none.
    """
    found = [find_latest(folder.checkpoints) or resumed]
    torch.distributed.broadcast_object_list(found, src=0)
    newest = found[0]
    at = Manifest.read(newest).step if newest else step
    if newest is None or at >= step:
        there = f"the newest one is {newest}" if newest else "there is none yet"
        raise TrainingDiverged(
            f"step {step} made the run diverge, and no earlier checkpoint exists: {there}. Start from an earlier "
            "one in another run.dir, with training.skip_batches, or lower optimizer.lr"
        )
    return newest, at
