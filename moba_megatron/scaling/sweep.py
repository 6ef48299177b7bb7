"""The runs of a sweep (`config.sweep`) as points of scaling laws: the cost, the folder and the first weights of
each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moba_megatron.config import Config, ConfigError
from moba_megatron.config.sizes import idle_parameters
from moba_megatron.config.sweep import choices_of, joined, number_of, run_name, swept_run
from moba_megatron.config.sweep_file import SweepFile, axis_problems, read_sweep
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.planning.flops import training_flops_per_token
from moba_megatron.runs.folder import RunFolder

PFLOP_S_DAY = 1e15 * 86400
"""Operations that a machine of 1 PFLOP/s does in a day: the unit of the report's figure 3."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        options: the option of each axis.
        start_from: the run of the sweep whose weights it starts with, or None.
        parameters: without embeddings and norms; of a mixture of experts the active ones.
        total_parameters: with the experts that do not process a token.
        flops_true: forward and backward operations of the whole training with attention counted by its pairs.
    """

    name: str
    options: dict[str, str]
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
        return self.points[number_of(self.path, [point.name for point in self.points], name)]

    def words_of(self, point: Point) -> str:
        """A point as `train.py` takes it: `SWEEP.yaml:RUN`."""
        name = str(self.points.index(point)) if point.name.isdecimal() else point.name
        return f"{self.path.resolve()}:{name}"


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep and check the configuration of every run.

    Raises:
        ConfigError: one line for each problem, with the run it is in.
    """
    path = Path(path)
    file = read_sweep(path)
    problems = axis_problems(file)
    points: dict[str, Point] = {}
    names = []
    for options, choice in choices_of(file):
        name = run_name(options)
        names.append(name)
        try:
            points[name] = _point(path, file, options, file.overrides | joined(choice), points)
        except ValueError as error:  # of a configuration, or of its attention schedule
            problems += [f"run {name}: {line}" for line in getattr(error, "problems", [str(error)])]
    if not points and not problems:
        problems.append(f"{path}: skip leaves no run")
    problems += [
        f"two runs would be named {name}: name the options apart"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if problems:
        raise ConfigError(problems)
    return Sweep(path, file, list(points.values()))


def _point(
    path: Path, file: SweepFile, options: dict[str, str], values: dict[str, Any], before: dict[str, Point]
) -> Point:
    run = swept_run(path, file, options, values, list(before))
    tokens = run.config.training.steps * run.config.tokens_per_step
    start_from, total = before.get(run.start_from or ""), run.parameters + idle_parameters(run.config.model)
    return Point(run.name, options, run.config, run.parameters, total, tokens, _true_flops(run.config), start_from)


def _true_flops(config: Config) -> float:
    """Operations of the whole training, each stage of the attention schedule by its own pairs."""
    if config.model.vocab_size is None:
        raise ConfigError(["model.vocab_size is not set: set it in the base; the output layer's size depends on it"])
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    total, first = 0.0, 0
    for number, stage in enumerate(schedule.stages):
        last = schedule.last_step(number, config.training.steps)
        layers = [a.sizes for a in stage]
        flops = training_flops_per_token(config, config.model.vocab_size, layers)
        total += (last - first) * config.tokens_per_step * flops
        first = last
    return total
