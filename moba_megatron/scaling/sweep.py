"""A sweep: one training configuration, and axes along which it varies.

    base: ../quickstart/moba.yaml
    dir: runs/scaling
    tokens_per_parameter: 20
    axes:
      size:
        small: {model.num_layers: 2, model.hidden_size: 64}
        large: {model.num_layers: 4, model.hidden_size: 128}
      attention:
        moba: {attention.kind: moba}
        full: {attention.kind: full}

stands for four runs, `small_moba` to `large_full`, in `runs/scaling/small_moba` and so on: one point for every choice
of one option from each axis. An option is a mapping of overrides, `key.path: value`; `tokens_per_parameter`, `tokens`
and `learning_rate` are keys of the sweep that an option may set too. `start_from` makes a run begin with the weights of
another run of the sweep, by its name, once that has finished; or with those of a folder, by its path.

The size of a mixture of experts is that of what works for a token: its *active* parameters. Tokens, learning rates,
6 N D and laws go by them, so that a dense model and a mixture of as many operations stand side by side.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from moba_megatron.config import Config, ConfigError, load_config
from moba_megatron.config.overrides import as_override, missing_keys, refuse_missing
from moba_megatron.config.reading import read_tree
from moba_megatron.config.section import Section
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.planning.flops import idle_parameters, matrix_parameters, training_flops_per_token
from moba_megatron.runs.folder import RunFolder

_MOST_RUNS = 10_000
PFLOP_S_DAY = 1e15 * 86400
"""Operations that a machine of 1 PFLOP/s does in a day: the unit of the report's figure 3."""


class LearningRateRule(Section):
    """The learning rate of a model by its size: value x (N / parameters) ^ exponent, whatever its attention; N counts
    active parameters."""

    value: float = Field(gt=0)
    """Peak learning rate of a model of `parameters`."""
    parameters: float = Field(default=1.0, gt=0)
    """Size (without embeddings) at which `value` holds."""
    exponent: float = 0.0
    """How it changes with size; 0: the same for all."""
    final_share: float = Field(default=0.1, ge=0, le=1)
    """`optimizer.min_lr` over `optimizer.lr`."""


class OptionKeys(Section):
    """Keys of the sweep that an option may set for its runs."""

    tokens_per_parameter: float | None = Field(default=None, gt=0)
    tokens: float | None = Field(default=None, gt=0)
    learning_rate: LearningRateRule | float | None = None
    start_from: str | None = None
    """Weights to begin with: an earlier run of the sweep, by its name, or a folder, by its path."""


class Figure(Section):
    """One picture of the sweep."""

    kind: Literal["scaling", "options", "positions", "curves"]
    """`scaling`: loss against compute with power laws, and the gap below it (the report's figure 3). `options`: loss
    for each option of an axis. `positions`: loss by position of every run. `curves`: training loss by tokens."""
    metric: str = "loss"
    """`loss` on validation, `trailing_loss`, or a number that `evaluate` adds, such as `needle_512_greedy_match`."""
    axis: str | None = None
    """`options`: the axis along the bottom. `scaling`: the axis whose options are compared (default `attention`)."""
    title: str = ""

    @property
    def compared_axis(self) -> str | None:
        """`axis`, or its default."""
        return self.axis or ("attention" if self.kind == "scaling" else None)


class SweepFile(Section):
    """What a sweep's YAML may hold."""

    base: str
    """Training configuration, relative to this file."""
    dir: str
    """Folder of the runs."""
    overrides: dict[str, Any] = {}
    """What all runs change of the base; an option may change it again."""
    axes: dict[str, dict[str, dict[str, Any]]] = Field(min_length=1)
    """For each axis its options, and for each option its overrides."""
    skip: list[dict[str, str]] = []
    """Combinations left out: a run is skipped where all the named axes have the named options."""
    tokens_per_parameter: float | None = Field(default=None, gt=0)
    """Training tokens for each active parameter without embeddings; sets `training.steps` (Chinchilla: 20)."""
    tokens: float | None = Field(default=None, gt=0)
    """Training tokens of every run instead. Neither: `training.steps` of the base."""
    learning_rate: LearningRateRule | None = None
    """None: `optimizer.lr` of the base."""
    warmup_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of the steps that warm up; None: `optimizer.warmup_steps` of the base."""
    best_of: list[str] = []
    """Axes, such as learning rates, of which fits and figures take only the best option of each combination of the
    others."""
    evaluate: list[str] = []
    """Arguments of `moba-megatron evaluate RUN ...` to run after each training, one string a call."""
    columns: list[str] = ["*"]
    """Which of the numbers that these add `table` shows, by names with `*` and `?`."""
    figures: list[Figure] = [Figure(kind="scaling")]
    """What `plot` draws."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        options: the option of each axis.
        overrides: what `train.py` is called with after the base.
        start_from: the run of the sweep whose weights it begins with, None for none.
        parameters: without embeddings and norms; of a mixture of experts the active ones.
        total_parameters: with the experts that a token does not pass.
        flops_true: forward and backward operations of the whole training with attention counted by its pairs.
    """

    name: str
    options: dict[str, str]
    overrides: list[str]
    config: Config
    parameters: int
    total_parameters: int
    tokens: int
    flops_true: float
    start_from: Point | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def run(self) -> RunFolder:
        """What training leaves in it."""
        return RunFolder(self.folder)

    @property
    def flops_6nd(self) -> float:
        """6 x parameters x tokens: the x-axis of the report's scaling laws, for both kinds of attention."""
        return 6.0 * self.parameters * self.tokens


@dataclass(frozen=True)
class Sweep:
    """A sweep file with its points, in the order of the axes."""

    path: Path
    file: SweepFile
    base: Path
    points: list[Point]

    @property
    def folder(self) -> Path:
        return Path(self.file.dir)

    @property
    def has_mixtures(self) -> bool:
        """Whether parameters of a model and those of a token differ."""
        return any(point.parameters != point.total_parameters for point in self.points)

    @property
    def compute(self) -> str:
        """What `flops_6nd` is called."""
        return "6 N D, N active" if self.has_mixtures else "6 N D"

    def point(self, name: str) -> Point:
        """A point by its number in the order of `plan` (from 0, as in a Slurm array) or by its name; digits alone are
        a number.

        Raises:
            ConfigError: there is none.
        """
        if name.isdecimal() and int(name) < len(self.points):
            return self.points[int(name)]
        for number, point in enumerate(self.points):
            if name == point.name and name.isdecimal():
                raise ConfigError([f"digits are the number of a run, from 0: {name} has number {number}"])
            if name == point.name:
                return point
        names = [point.name for point in self.points if not point.name.isdecimal()]
        raise ConfigError([
            f"{self.path} has no run {name!r}: give " + " or one of ".join(
                filter(None, [f"a number below {len(self.points)}", ", ".join(names)]))
        ])  # fmt: skip


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep and check the configuration of every run.

    Raises:
        ConfigError: one line for each problem, with the run it is in.
    """
    path = Path(path)
    file = _read(path)
    base = path.parent / file.base
    problems = _axis_problems(file)
    points: list[Point] = []
    for choice in itertools.product(*(options.items() for options in file.axes.values())):
        options = dict(zip(file.axes, (name for name, _ in choice), strict=True))
        if any(all(options.get(axis) == option for axis, option in rule.items()) for rule in file.skip):
            continue
        try:
            points.append(_point(file, base, options, file.overrides | _joined(choice), points))
        except ValueError as error:  # of a configuration, or of its attention schedule
            name = point_name(options)
            problems += [f"run {name}: {line}" for line in getattr(error, "problems", [str(error)])]
    if not points and not problems:
        problems.append(f"{path}: skip leaves no run")
    names = [point.name for point in points]
    problems += [
        f"two runs would be named {name}: name the options apart"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if problems:
        raise ConfigError(problems)
    return Sweep(path, file, base, points)


def point_name(options: dict[str, str]) -> str:
    """The name of a run, which is that of its folder.

    >>> point_name({"size": "55K", "attention": "2 of 8"})
    '55K_2-of-8'
    """
    return re.sub(r"[^\w.+-]+", "-", "_".join(options.values()))


def _read(path: Path) -> SweepFile:
    if not path.is_file():
        raise ConfigError([f"no such sweep: {path}"])
    try:
        # References (`${...}`) stay as they are: those in options are to keys of the training configuration.
        values = read_tree(path)
        refuse_missing(values, tuple(key for key in missing_keys(values) if key.endswith("model.init_from")))
        return SweepFile.model_validate(values)
    except ValidationError as error:
        raise ConfigError([f"{path}: {line}" for line in _explain(error)]) from error


def _explain(error: ValidationError) -> list[str]:
    return [": ".join(filter(None, [".".join(map(str, item["loc"])), item["msg"]])) for item in error.errors()]


def _axis_problems(file: SweepFile) -> list[str]:
    problems = [f"axes.{axis} has no options" for axis, options in file.axes.items() if not options]
    runs = math.prod(map(len, file.axes.values()))
    if runs > _MOST_RUNS:
        # Before they are made one by one.
        raise ConfigError([f"axes: their options make {runs:,} runs, over {_MOST_RUNS:,}: leave some out"])
    problems += [f"best_of names {axis!r}, which is no axis" for axis in file.best_of if axis not in file.axes]
    for rule in file.skip:
        problems += [
            f"skip names {axis}: {option}, which is no option of an axis"
            for axis, option in rule.items()
            if option not in file.axes.get(axis, {})
        ]
    for figure in file.figures:
        axis = figure.compared_axis
        if figure.kind in ("scaling", "options") and axis not in file.axes:
            problems.append(f"a figure of kind {figure.kind} needs axis, one of {', '.join(file.axes)}, not {axis!r}")
        if figure.kind == "scaling" and figure.metric not in ("loss", "trailing_loss"):
            problems.append(f"a figure of kind scaling shows loss or trailing_loss, not {figure.metric!r}")
    if file.tokens is not None and file.tokens_per_parameter is not None:
        problems.append("give tokens or tokens_per_parameter, not both")
    return problems


def _joined(choice: tuple[tuple[str, dict[str, Any]], ...]) -> dict[str, Any]:
    """The overrides of the chosen options; those of two axes must not meet."""
    joined: dict[str, Any] = {}
    for option, values in choice:
        twice = sorted(joined.keys() & values.keys())
        if twice:
            raise ConfigError([f"{', '.join(twice)}: set by {option} and by an option of another axis"])
        joined |= values
    return joined


def _point(file: SweepFile, base: Path, options: dict[str, str], values: dict[str, Any], before: list[Point]) -> Point:
    try:
        own = OptionKeys.model_validate({key: value for key, value in values.items() if "." not in key})
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error
    values = {key: value for key, value in values.items() if "." in key}
    if "run.dir" in values:
        raise ConfigError(["run.dir: the folder of a run is the sweep's dir and the run's name"])
    file = file.model_copy(update=_own_values(own))
    name = point_name(options)
    overrides = [as_override("run.dir", str(Path(file.dir) / name), Config)]
    overrides += [as_override(key, value, Config) for key, value in values.items()]
    first = load_config(base, overrides)
    parameters = matrix_parameters(first.model, vocab_size=0)
    derived = _derived(file, first, parameters)
    twice = sorted(derived.keys() & values.keys())
    if twice:
        raise ConfigError([f"{', '.join(twice)}: set by an option and by the sweep's tokens, learning_rate or "
                           "warmup_share: let options set those"])  # fmt: skip
    overrides += [f"{key}={value}" for key, value in derived.items()]
    config = load_config(base, overrides)
    start_from = next((point for point in before if point.name == own.start_from), None)
    if own.start_from is not None:
        if start_from is None and "/" not in own.start_from:
            names = ", ".join(point.name for point in before) or "none"
            raise ConfigError(
                [f"start_from = {own.start_from}: give a run before it ({names}) or the path of a folder"]
            )
        # What is there may come later, so that its model cannot complete this one's. What the base leaves out is said
        # to train.py, which would take it from there.
        model = config.model
        unsaid = {key: value for key, value in model.model_dump().items() if key not in model.model_fields_set}
        overrides += [as_override(f"model.{key}", value, Config) for key, value in unsaid.items() if value is not None]
        init_from = own.start_from if start_from is None else str(start_from.folder)
        overrides.append(as_override("model.init_from", init_from, Config))
        config = config.model_copy(update={"model": config.model.model_copy(update={"init_from": init_from})})
    tokens = config.training.steps * config.tokens_per_step
    total = parameters + idle_parameters(config.model)
    return Point(name, options, overrides, config, parameters, total, tokens, _true_flops(config), start_from)


def _own_values(own: OptionKeys) -> dict[str, Any]:
    """Settings of the sweep that an option sets; one way of giving the tokens replaces the other."""
    values: dict[str, Any] = {}
    if own.learning_rate is not None:
        rate = own.learning_rate
        values["learning_rate"] = rate if isinstance(rate, LearningRateRule) else LearningRateRule(value=rate)
    if own.tokens is not None:
        values |= {"tokens_per_parameter": None, "tokens": own.tokens}
    if own.tokens_per_parameter is not None:
        values |= {"tokens": None, "tokens_per_parameter": own.tokens_per_parameter}
    return values


def _derived(file: SweepFile, config: Config, parameters: int) -> dict[str, Any]:
    """The overrides that follow from the size of the model."""
    tokens = file.tokens or (file.tokens_per_parameter or 0) * parameters
    steps = max(1, round(tokens / config.tokens_per_step)) if tokens else config.training.steps
    found: dict[str, Any] = {"training.steps": steps} if tokens else {}
    if file.learning_rate:
        rule = file.learning_rate
        lr = rule.value * (parameters / rule.parameters) ** rule.exponent
        found |= {"optimizer.lr": f"{lr:.4g}", "optimizer.min_lr": f"{lr * rule.final_share:.4g}"}
    if file.warmup_share is not None:
        found["optimizer.warmup_steps"] = round(steps * file.warmup_share)
    return found


def _true_flops(config: Config) -> float:
    """Operations of the whole training, each stage of the attention schedule by its own pairs."""
    if config.model.vocab_size is None:
        raise ConfigError(["model.vocab_size is not set: set it in the base, the output layer's operations count"])
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    total, first = 0.0, 0
    for number, stage in enumerate(schedule.stages):
        last = schedule.last_step(number, config.training.steps)
        layers = [None if a.kind == "full" else (a.block_size, a.top_k) for a in stage]
        flops = training_flops_per_token(config, config.model.vocab_size, layers)
        total += (last - first) * config.tokens_per_step * flops
        first = last
    return total
