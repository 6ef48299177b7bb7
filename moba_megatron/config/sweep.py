"""The runs of a sweep (`sweep_file`) as configurations: `SWEEP.yaml:RUN` is one wherever a configuration is read."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moba_megatron.config.checks import ConfigError
from moba_megatron.config.load import config_from_tree, read_bases
from moba_megatron.config.overrides import as_override
from moba_megatron.config.schema import Config
from moba_megatron.config.section import MOST_STEPS
from moba_megatron.config.sizes import matrix_parameters
from moba_megatron.config.sweep_file import LearningRateRule, OptionKeys, SweepFile, explain_keys

_WEIGHTS = "model.init_from="


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep.

    Attributes:
        name: also that of its folder.
        options: the option of each axis.
        tree, overrides: the base, and the changes of the run.
        config: the complete configuration, as in `train.py`.
        parameters: active ones, without embeddings and norms.
        start_from: the run of the sweep, by its name, or the folder, whose weights it starts with; None without one.
    """

    name: str
    options: dict[str, str]
    tree: dict[str, Any]
    overrides: list[str]
    config: Config
    parameters: int
    start_from: str | None = None

    def with_overrides(self, overrides: list[str]) -> Config:
        """The configuration for a training, with overrides on top of those of the run.

        Raises:
            ConfigError: as `load_config`.
        """
        source = self.config.model.init_from
        from_weights = self.start_from is not None and source is not None
        weights_exist = from_weights and Path(str(source)).exists()
        if not overrides and not weights_exist:
            return self.config
        if not from_weights or weights_exist:
            return config_from_tree(self.tree, [*self.overrides, *overrides])
        # A plan needs no weights, and those of another run may come later.
        own = [override for override in self.overrides if not override.startswith(_WEIGHTS)]
        config = config_from_tree(self.tree, [*own, *overrides])
        if any(override.startswith(_WEIGHTS) for override in overrides):
            return config
        return config.model_copy(update={"model": config.model.model_copy(update={"init_from": source})})


def choices_of(file: SweepFile) -> Iterator[tuple[dict[str, str], tuple[tuple[str, dict[str, Any]], ...]]]:
    """The option of each axis, and these options with their overrides, for each run, in the order of the axes."""
    for choice in itertools.product(*(options.items() for options in file.axes.values())):
        options = dict(zip(file.axes, (name for name, _ in choice), strict=True))
        if not any(all(options.get(axis) == option for axis, option in rule.items()) for rule in file.skip):
            yield options, choice


def run_name(options: dict[str, str]) -> str:
    """The name of a run, which is that of its folder.

    >>> run_name({"size": "55K", "attention": "2 of 8"})
    '55K_2-of-8'
    """
    return re.sub(r"[^\w.+-]+", "-", "_".join(options.values()))


def joined(choice: tuple[tuple[str, dict[str, Any]], ...]) -> dict[str, Any]:
    """The overrides of the chosen options; those of two axes must not meet."""
    joined: dict[str, Any] = {}
    for option, values in choice:
        twice = sorted(joined.keys() & values.keys())
        if twice:
            raise ConfigError([f"{', '.join(twice)}: set by {option} and by an option of another axis"])
        joined |= values
    return joined


def swept_run(
    path: Path, file: SweepFile, options: dict[str, str], values: dict[str, Any], before: Sequence[str]
) -> SweptRun:
    """One run of a sweep.

    Args:
        path: of the sweep.
        options: of the run.
        values: what these say.
        before: names of the runs before it, which it may start from.

    Raises:
        ConfigError: with one line for each problem.
    """
    try:
        own = OptionKeys.model_validate({key: value for key, value in values.items() if "." not in key})
    except ValidationError as error:
        raise ConfigError(explain_keys(error)) from error
    values = {key: value for key, value in values.items() if "." in key}
    if "run.dir" in values:
        raise ConfigError(["run.dir: the folder of a run is the sweep's dir and the run's name"])
    file = file.model_copy(update=_own_values(own))
    name = run_name(options)
    overrides = [as_override("run.dir", str(Path(file.dir) / name), Config)]
    overrides += [as_override(key, value, Config) for key, value in values.items()]
    base = read_bases(path, file.base)
    first = config_from_tree(base, [*overrides, *_to_be_derived(file)])
    parameters = matrix_parameters(first.model, vocab_size=0)
    derived = _derived(file, first, parameters)
    twice = sorted(derived.keys() & values.keys())
    if twice:
        raise ConfigError([f"{', '.join(twice)}: set by an option and by the sweep's tokens, learning_rate or "
                           "warmup_share: let options set those"])  # fmt: skip
    overrides += [f"{key}={value}" for key, value in derived.items()]
    config = config_from_tree(base, overrides) if derived else first
    if own.start_from is not None:
        if own.start_from not in before and "/" not in own.start_from:
            names = ", ".join(before) or "none"
            raise ConfigError(
                [f"start_from = {own.start_from}: give a run before it ({names}) or the path of a folder"]
            )
        # The weights may not exist yet, so their model cannot complete this one. All keys that the base leaves out are
        # set here, or they would come from the weights later.
        model = config.model
        unsaid = {key: value for key, value in model.model_dump().items() if key not in model.model_fields_set}
        overrides += [as_override(f"model.{key}", value, Config) for key, value in unsaid.items() if value is not None]
        init_from = str(Path(file.dir) / own.start_from) if own.start_from in before else own.start_from
        overrides.append(as_override("model.init_from", init_from, Config))
        config = config.model_copy(update={"model": config.model.model_copy(update={"init_from": init_from})})
    return SweptRun(name, options, base, overrides, config, parameters, own.start_from)


def run_of(path: Path, name: str, file: SweepFile) -> SweptRun:
    """A run of a sweep by its name, or its number in the order of the axes (from 0).

    Args:
        path: of the sweep.
        file: what it holds.

    Raises:
        ConfigError: there is no such run, or its configuration is wrong.
    """
    choices = list(choices_of(file))
    names = [run_name(options) for options, _ in choices]
    number = number_of(path, names, name)
    options, choice = choices[number]
    try:
        return swept_run(path, file, options, file.overrides | joined(choice), names[:number])
    except ConfigError as error:
        raise ConfigError([f"run {names[number]}: {line}" for line in error.problems]) from error


def number_of(path: Path, names: list[str], name: str) -> int:
    """The number of a run by its name or its number; digits alone are a number.

    Raises:
        ConfigError: there is no such run.
    """
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    if name in names and name.isdecimal():
        number = names.index(name)
        raise ConfigError([
            f"{name} is read as a run's number (from 0). The run called {name} has number {number}: use that"
        ])  # fmt: skip
    if name in names:
        return names.index(name)
    words = ", ".join(other for other in names if not other.isdecimal())
    raise ConfigError([
        f"{path} has no run {name!r}: give " + " or one of ".join(
            filter(None, [f"a number below {len(names)}", words]))
    ])  # fmt: skip


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


def _to_be_derived(file: SweepFile) -> list[str]:
    """Placeholders for settings that follow from the size of the model and may be missing in the base."""
    tokens = file.tokens or file.tokens_per_parameter
    steps = [f"training.steps={MOST_STEPS}"] if tokens else []
    return steps + (["optimizer.lr=1", "optimizer.min_lr=0"] if file.learning_rate else [])


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
