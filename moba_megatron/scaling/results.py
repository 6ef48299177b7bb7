"""The results of a sweep's runs, read from their run folders."""

from __future__ import annotations

import math
import re
import signal
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moba_megatron.config import Config, ConfigError, load_config
from moba_megatron.model.schedule import AttentionSchedule, kind_of
from moba_megatron.runs.files import read_json, read_json_lines
from moba_megatron.runs.folder import training_records
from moba_megatron.scaling.sweep import Point, Sweep

State = Literal["missing", "cut", "running", "failed", "finished"]

LOG = "sweep.log"
"""In a run folder: what the run said when a sweep ran it."""

ENDED = "ended with code "
"""How the last line of that log begins."""

# By SIGTERM, SIGKILL (a job's end, too little memory) and Ctrl-C: as `Popen` and as a shell tell it.
_ASKED_TO_STOP = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT, 143, 137, 130)

_FREE = (
    "model.max_position_embeddings",
    "attention.backend",
    "attention.full_backend",
    "attention.workspace_bytes",
    "evaluation.every",
)


@dataclass(frozen=True)
class Result:
    """The state of one run.

    Attributes:
        state: `finished`; `cut` (stopped, paused or killed, and will be continued); `failed`; `running`; `missing`.
        step: steps on record.
        why: for a failed run, its error.
        loss, trailing_loss: nats per token on validation at the end; None until finished, or without such a number.
        by_position: the last evaluation's ranges of positions.
        seconds: time in steps so far, over all pieces.
        tasks: lines that `moba-megatron evaluate` added for this checkpoint, other than losses, and than those
            of `--routing-choice`.
    """

    point: Point
    state: State
    step: int = 0
    why: str = ""
    loss: float | None = None
    trailing_loss: float | None = None
    by_position: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tasks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def made_on(self) -> str:
        """Commit, PyTorch and hardware of the training's last start, in words; empty before its first."""
        facts = read_json(self.point.run.environment) or {}
        parts = {
            "commit": facts.get("commit"),
            "PyTorch": facts.get("torch"),
            "": facts.get("GPUs of the first node") or facts.get("processor"),
        }
        return ", ".join(f"{name} {value}".strip() for name, value in parts.items() if value)

    def metric(self, name: str) -> float | None:
        """`loss`, `trailing_loss`, or a number of a further evaluation; if it was made under several attentions, under
        that of the last step of training."""
        known = {"loss": self.loss, "trailing_loss": self.trailing_loss}
        if name in known:
            return known[name]
        values = {record["attention"]: record[name] for record in self.tasks if name in record}
        config = self.point.config
        schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
        return values.get(kind_of(schedule.stages[-1]), next(iter(values.values()), None))


def read_results(sweep: Sweep) -> list[Result]:
    """All runs of a sweep, in its order.

    Raises:
        ConfigError: a run folder holds a run with other settings than the sweep now has.
    """
    return [read_result(point) for point in sweep.points]


def read_result(point: Point) -> Result:
    """One run. See `read_results`."""
    status = read_json(point.run.status, needs=("state", "step"))
    if status is None:
        return _before_first_step(point)
    _check_settings(point)
    steps = read_json_lines(point.run.metrics, needs=("step", "step_seconds"))
    evaluations = read_json_lines(point.run.evaluations, needs=("step",))
    state, step = _state(point, status), int(steps[-1]["step"]) if steps else 0
    seconds = sum(line["step_seconds"] for line in steps)
    if state != "finished":
        error = status.get("error") if status["state"] == "failed" else None
        why = str(error or last_line(point.folder / LOG)) if state == "failed" else ""
        return Result(point, state, step, why, seconds=seconds)
    at_end = [line for line in evaluations if line["step"] == point.config.training.steps]
    losses = training_records(at_end)
    if not losses:
        return Result(point, "failed", step, "finished without an evaluation: set data.validation", seconds=seconds)
    last = losses[-1]
    if wrong := _not_a_result(last):
        return Result(point, "failed", step, f"finished, but {wrong}: train it again", seconds=seconds)
    # Lines with a choice of blocks that is not the model's own ("choice") say nothing of the run.
    tasks = [line for line in at_end if line.get("kind", "losses") != "losses" and "choice" not in line]
    return Result(
        point, "finished", step, "", last["loss"], last["trailing_loss"], last["by_position"], seconds, tasks
    )  # fmt: skip


def _not_a_result(record: dict[str, Any]) -> str | None:
    """The reason why an evaluation is not a result: a fit or a table would take a NaN for a number."""
    for name in ("loss", "trailing_loss", "by_position"):
        if name not in record:
            return f"its evaluation has no {name}"
    for name in ("loss", "trailing_loss"):
        value = record[name]
        if (value is not None or name == "loss") and not _finite(value):
            return f"its {name} is {value}"
    return None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def best(results: list[Result], axes: list[str], metric: str = "loss") -> list[Result]:
    """Of finished runs that have this metric and differ only along these axes, the one of least loss: of trailing loss
    where that is the metric."""
    judge = metric if metric == "trailing_loss" else "loss"
    found: dict[tuple[str, ...], Result] = {}
    for result in results:
        if result.metric(metric) is None:
            continue
        key = tuple(option for axis, option in result.point.options.items() if axis not in axes)
        if key not in found or result.metric(judge) < found[key].metric(judge):
            found[key] = result
    return list(found.values())


def last_line(path: Path) -> str:
    """The last line of a log that says something, without the marks around a launcher's report."""
    if not path.is_file():
        return ""
    lines = [line.strip() for line in path.read_text(errors="replace", encoding="utf-8").splitlines()]
    return next((line for line in reversed(lines) if line.strip("=- ") and not line.startswith(ENDED)), "")


def _before_first_step(point: Point) -> Result:
    """A run that ended before its first step leaves no status, only what it said and the code that it ended with."""
    log = point.folder / LOG
    if not log.is_file():
        return Result(point, "missing")
    return Result(point, "failed", why=last_line(log)) if _ended_badly(log) else Result(point, "cut")


def _ended_badly(log: Path) -> bool:
    """Whether the last process of a run ended by a failure, and not because it was asked to stop."""
    text = log.read_text(errors="replace", encoding="utf-8") if log.is_file() else ""
    codes = re.findall(rf"^{ENDED}(-?\d+)$", text, re.MULTILINE)
    # A run that has started since has not said how it ended.
    if not codes or not text.rstrip().endswith(f"{ENDED}{codes[-1]}"):
        return False
    return int(codes[-1]) not in (0, *_ASKED_TO_STOP)


def _state(point: Point, status: dict[str, Any]) -> State:
    if status["state"] == "finished" and status["step"] >= point.config.training.steps:
        return "finished"
    if status["state"] == "running" and _alive(status):
        return "running"
    # What fails before its first step leaves the status of the process before it.
    return "failed" if status["state"] == "failed" or _ended_badly(point.folder / LOG) else "cut"


def _alive(status: dict[str, Any]) -> bool:
    """Whether the process that wrote this status still runs on this machine, and is no other one of its number."""
    words = Path(f"/proc/{status.get('pid')}/cmdline")
    return status.get("host") == socket.gethostname() and words.is_file() and b"train" in words.read_bytes()


def _check_settings(point: Point) -> None:
    """Raise if the run folder's configuration is not the point's, in anything that shapes its numbers."""
    path = point.run.config
    if not path.is_file():
        return
    there, wanted = _shaping(load_config(path)), _shaping(point.config)
    # What the sweep leaves open is as in the weights that the run starts from.
    left_open = {k for k, v in wanted.items() if v is None and k.startswith("model.") and point.config.model.init_from}
    changed = [
        f"{key} = {value!r} (the run has {there[key]!r})"
        for key, value in wanted.items()
        if there[key] != value and key not in left_open
    ]
    if changed:
        raise ConfigError([
            f"{point.folder} holds a run with other settings than the sweep: {'; '.join(changed)}: "
            "give the sweep another dir, or move that run away"
        ])  # fmt: skip


def _shaping(config: Config) -> dict[str, Any]:
    """The settings that shape a run's numbers, by key."""
    tree = config.model_dump(mode="json")
    sections = ("model", "attention", "data", "optimizer", "evaluation")
    keys = [(section, key) for section in sections for key in tree[section]]
    keys += [("training", key) for key in ("steps", "global_batch_size", "precision")] + [("run", "seed")]
    return {f"{a}.{b}": tree[a][b] for a, b in keys if f"{a}.{b}" not in _FREE}
