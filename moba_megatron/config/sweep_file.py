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

The size of a mixture of experts counts the parameters that process a token: its *active* parameters. Tokens and
learning rates follow from them, so a dense model and a mixture with the same operations get the same.

This module describes the file. `sweep` makes its runs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from moba_megatron.config.checks import ConfigError
from moba_megatron.config.overrides import missing_keys, refuse_missing
from moba_megatron.config.reading import read_tree
from moba_megatron.config.section import Section

_MOST_RUNS = 10_000

# YAML reads a name such as 1234 or 0.5 as a number.
OptionName = Annotated[
    str,
    BeforeValidator(lambda name: str(name) if isinstance(name, int | float) and not isinstance(name, bool) else name),
]


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
    """The contents of a sweep's YAML file."""

    base: str | list[str]
    """Training configuration, relative to this file; or several, later ones winning."""
    dir: str
    """Folder of the runs."""
    overrides: dict[str, Any] = {}
    """Changes of the base for all runs; an option may change them again."""
    axes: dict[OptionName, dict[OptionName, dict[str, Any]]] = Field(min_length=1)
    """For each axis its options, and for each option its overrides."""
    skip: list[dict[OptionName, OptionName]] = []
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
    """Axes, such as learning rates or seeds. Fits and figures use only the best option of these axes for each
    combination of the others."""
    evaluate: list[str] = []
    """Arguments of `moba-megatron evaluate RUN ...` to run after each training, one string a call."""
    columns: list[str] = ["*"]
    """Which of the numbers that these add `table` shows, by names with `*` and `?`."""
    figures: list[Figure] = [Figure(kind="scaling")]
    """What `plot` draws."""


def read_sweep(path: Path) -> SweepFile:
    """The sweep of a file.

    Raises:
        ConfigError: with one line for each problem.
    """
    if not path.is_file():
        raise ConfigError([f"no such sweep: {path}"])
    return sweep_of(path, read_tree(path))


def sweep_of(path: Path, values: Any) -> SweepFile:
    """The sweep that a file holds, from its values. Raises as `read_sweep`."""
    try:
        # References (`${...}`) stay unresolved: in options they refer to keys of the training configuration.
        refuse_missing(values, tuple(key for key in missing_keys(values) if key.endswith("model.init_from")))
        return SweepFile.model_validate(values)
    except ValidationError as error:
        raise ConfigError([f"{path}: {line}" for line in explain_keys(error)]) from error


def explain_keys(error: ValidationError) -> list[str]:
    return [": ".join(filter(None, [".".join(map(str, item["loc"])), item["msg"]])) for item in error.errors()]


def axis_problems(file: SweepFile) -> list[str]:
    problems = [f"axes.{axis} has no options" for axis, options in file.axes.items() if not options]
    runs = math.prod(map(len, file.axes.values()))
    if runs > _MOST_RUNS:
        # Before they are made one by one.
        raise ConfigError([f"axes: their options make {runs:,} runs, over {_MOST_RUNS:,}: leave some out"])
    problems += [f"best_of names {axis!r}, which is not an axis" for axis in file.best_of if axis not in file.axes]
    for rule in file.skip:
        problems += [
            f"skip names {axis}: {option}, which is not an option of an axis"
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
