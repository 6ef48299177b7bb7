"""The attention schedule: what each layer attends to, in each stage of the training (MoBA report, section 3.2).

A schedule is plain data: for each stage a tuple with one `LayerAttention` per layer, and the share of the training at
which the stage ends. Which layers are full is found in this order, the later rule winning:

1. `kind` holds for every layer;
2. `full_layers`, `full_every_n` and `last_n_full` make layers full;
3. `layers` sets single layers, in every respect.

A stage that leaves a setting out takes the one of the `attention` section. There is one exception. If a stage sets
`kind` but not `layers`, the `kind` of the stage wins over the `kind` in the section's `layers`; these keep only their
sizes. So `{until: 1.0, kind: full}` makes every layer full.

Sizes for a single layer that is full in every stage would have no effect and are refused.

Stages are cut by steps. With S steps in all, a stage that ends at the share u of the training ends after step
floor(u S + 1/2): the nearest whole step, halves upward. Steps count from 1, so with S = 100 and u = 0.9 step 90 is the
last of the first stage and step 91 the first of the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moba_megatron.config import AttentionConfig, AttentionKind, AttentionStage, Config, ConfigError
from moba_megatron.config.router import learning_problems
from moba_megatron.ops.selection import MOBA, Selection


@dataclass(frozen=True)
class LayerAttention:
    """How one layer attends: `full`, or `moba` with `block_size` (tokens) and `top_k` (blocks; the current one counts),
    chosen as `selection` says.

    A full layer has none of these, so two schedules with the same computation are equal. Where key heads have a K of
    their own, `selection.budgets` holds them and `top_k` is the largest.

    >>> print(LayerAttention("moba", 512, 3), LayerAttention("moba", 512, 3, Selection("recent")), sep="; ")
    moba B=512 K=3; moba B=512 K=3 recent
    """

    kind: AttentionKind
    block_size: int | None = None
    top_k: int | None = None
    selection: Selection = MOBA

    def __post_init__(self):
        if self.kind == "full":
            if self.block_size is not None or self.top_k is not None or not self.selection.is_plain:
                raise ValueError(
                    f"full attention takes no block_size ({self.block_size}), no top_k ({self.top_k}) and no selection "
                    f"of blocks ({self.selection})"
                )
        elif self.kind == "moba":
            if not self.block_size or not self.top_k or self.block_size < 1 or self.top_k < 1:
                raise ValueError(
                    f"moba attention needs block_size and top_k of at least 1, not {self.block_size} and {self.top_k}"
                )
            self.selection.with_blocks(self.top_k)
        else:
            raise ValueError(f"kind {self.kind!r} of attention: 'moba' or 'full'")

    def __str__(self) -> str:
        if self.kind == "full":
            return "full"
        return f"moba B={self.block_size} {self.selection.words(self.top_k or 1)}"

    @classmethod
    def moba(cls, block_size: int, top_k: int | Sequence[int], selection: Selection = MOBA) -> LayerAttention:
        """A MoBA layer whose `top_k` may be a list: one K for each key head."""
        return cls("moba", block_size, *selection.with_blocks(top_k))

    @property
    def blocks(self) -> int | tuple[int, ...] | None:
        """K, or that of each key head; None in a full layer."""
        return None if self.top_k is None else self.selection.blocks(self.top_k)

    @property
    def fewest_blocks(self) -> int:
        """The smallest K of any head of a MoBA layer."""
        assert self.top_k is not None, self
        return self.selection.fewest_blocks(self.top_k)

    @property
    def mean_blocks(self) -> float:
        """The mean K over the heads of a MoBA layer."""
        assert self.top_k is not None, self
        budgets = self.selection.budgets or (self.top_k,)
        return sum(budgets) / len(budgets)

    @property
    def sizes(self) -> tuple[int, int | tuple[int, ...]] | None:
        """Block size and K (or that of each key head), None in a full layer: what `attended_pairs` counts by."""
        return None if self.block_size is None or self.blocks is None else (self.block_size, self.blocks)

    def repeated(self, times: int) -> LayerAttention:
        """The same for key heads that stand so many times side by side."""
        if self.selection.budgets is None:
            return self
        budgets = tuple(k for k in self.selection.budgets for _ in range(times))
        return replace(self, selection=replace(self.selection, budgets=budgets))

    def of_heads(self, first: int, count: int) -> LayerAttention:
        """How some of the key heads attend, such as those of one tensor-parallel rank."""
        if self.selection.budgets is None:
            return self
        assert self.block_size is not None
        some = self.selection.of_heads(first, count)
        return LayerAttention.moba(self.block_size, some.budgets or (), some.with_one_budget)


FULL = LayerAttention("full")


@dataclass(frozen=True)
class AttentionSchedule:
    """The attention of every layer in every stage.

    Attributes:
        stages: for each stage one entry per layer, layer 1 first.
        until: for each stage the share of the training at which it ends, rising to 1.0.
    """

    stages: tuple[tuple[LayerAttention, ...], ...]
    until: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        if len(self.stages) != len(self.until) or not self.stages:
            raise ValueError(f"{len(self.stages)} stages and {len(self.until)} ends: give one end for each stage")
        if len({len(layers) for layers in self.stages}) != 1:
            raise ValueError(f"stages with different numbers of layers: {[len(layers) for layers in self.stages]}")
        shares = (0.0, *self.until)
        if any(a >= b for a, b in zip(shares, shares[1:], strict=False)) or self.until[-1] != 1.0:
            raise ValueError(f"the ends of the stages must rise from above 0 to 1.0, not {self.until}")

    @classmethod
    def from_config(cls, attention: AttentionConfig, num_layers: int) -> AttentionSchedule:
        """The schedule of a configuration's `attention` section for a model of `num_layers` layers.

        Raises:
            ValueError: if a layer is named that the model does not have, or given sizes while it is full in all stages.
        """
        stages = attention.stages or [AttentionStage(until=1.0)]
        layers = tuple(_stage_layers(attention, stage, num_layers) for stage in stages)
        schedule = cls(layers, tuple(stage.until for stage in stages))
        for given in (attention.layers, *(stage.layers or {} for stage in stages)):
            for number, override in given.items():
                names = override.of_moba
                if names and schedule.always_full(number):
                    raise ValueError(
                        f"attention.layers gives layer {number} {', '.join(names)}, but it is full in every stage: "
                        f"give it `kind: moba`, or take {', '.join(names)} out"
                    )
        return schedule

    @classmethod
    def uniform(cls, num_layers: int, layer: LayerAttention) -> AttentionSchedule:
        """One stage in which every layer attends alike."""
        return cls(((layer,) * num_layers,))

    @property
    def num_layers(self) -> int:
        return len(self.stages[0])

    def last_step(self, stage: int, steps: int) -> int:
        """The last step (counted from 1) of a stage when the training has `steps` steps."""
        # Rounded first, so that a half that binary fractions miss by their last place is still a half: 0.29 * 50.
        return math.floor(round(self.until[stage] * steps, 9) + 0.5)

    def stage_at(self, step: int, steps: int) -> int:
        """The stage (counted from 0) that holds at `step`, counted from 1: the step that is about to be taken.

        A stage shorter than half a step has no step.

        Raises:
            ValueError: if `step` is not one of 1 to `steps`.
        """
        if not 1 <= step <= steps:
            raise ValueError(f"step {step} is not one of 1 to {steps}")
        return next(stage for stage in range(len(self.stages)) if step <= self.last_step(stage, steps))

    def always_full(self, layer_number: int) -> bool:
        """Whether this layer (counted from 1) attends fully in every stage."""
        return all(layers[layer_number - 1].kind == "full" for layers in self.stages)

    def over_pattern(self, pattern: str) -> AttentionSchedule:
        """This schedule of the attention layers alone, spread over all layers of a hybrid model.

        megatron-core's `HybridModel` counts layers of all kinds in `layer_number`. In the places of layers without
        attention the result says `full`; `attention_layers` tells which those are.

        Args:
            pattern: one letter a layer, `*` for attention; `|` between pipeline stages.

        Raises:
            ValueError: if the pattern has no attention layer, another number of them, or layers of multi-token
                prediction.

        >>> schedule = AttentionSchedule.uniform(2, LayerAttention("moba", 512, 3))
        >>> [layer.kind for layer in schedule.over_pattern("M*-M*-").stages[0]]
        ['full', 'moba', 'full', 'full', 'moba', 'full']
        """
        found = attention_layers(pattern)
        if len(found) != self.num_layers:
            raise ValueError(
                f"pattern {pattern!r} has {len(found)} attention layers (*), but the schedule has {self.num_layers}"
            )
        length = len(pattern.replace("|", ""))
        stages = []
        for stage in self.stages:
            layers = dict(zip(found, stage, strict=True))
            stages.append(tuple(layers.get(number, FULL) for number in range(1, length + 1)))
        return AttentionSchedule(tuple(stages), self.until)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON or a checkpoint; `from_dict` reads them back."""
        return {"until": list(self.until), "stages": [[_to_list(layer) for layer in layers] for layers in self.stages]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AttentionSchedule:
        """The schedule that `to_dict` wrote.

        Raises:
            ValueError: if `values` is not of that form.
        """
        try:
            stages = tuple(tuple(_from_list(layer) for layer in layers) for layers in values["stages"])
            return cls(stages, tuple(values["until"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a stored attention schedule: {type(error).__name__}: {error}") from error

    def table(self, steps: int | None = None) -> str:
        """A few readable lines: each stage with its layers, equal neighbours together; with `steps`, also its steps."""
        lines, first = [], 1
        for stage, layers in enumerate(self.stages):
            head = f"stage {stage + 1}/{len(self.stages)} until {self.until[stage]:.0%}"
            if steps is not None:
                last = self.last_step(stage, steps)
                head += f" (steps {first}-{last})" if last >= first else " (no steps)"
                first = last + 1
            runs = (f"layers {a}-{b}: {what}" if a != b else f"layer {a}: {what}" for a, b, what in _runs(layers))
            lines.append(head + "  " + ", ".join(runs))
        return "\n".join(lines)

    def differences(self, other: AttentionSchedule) -> list[str]:
        """Differences of `other` from this schedule, one line each; empty if they are equal."""
        if self.num_layers != other.num_layers:
            return [f"{self.num_layers} layers against {other.num_layers}"]
        if self.until != other.until:
            return [f"stages end at {list(self.until)} of the training against {list(other.until)}"]
        return [
            f"stage {stage + 1}, layer {number}: {mine} against {theirs}"
            for stage, (ours, others) in enumerate(zip(self.stages, other.stages, strict=True))
            for number, (mine, theirs) in enumerate(zip(ours, others, strict=True), start=1)
            if mine != theirs
        ]


def attention_layers(pattern: str) -> list[int]:
    """Numbers, from 1, of the attention layers of a hybrid model.

    Raises:
        ValueError: if there are none, or layers of multi-token prediction.

    >>> attention_layers("M*-|M*-")
    [2, 5]
    """
    if "/" in pattern:
        raise ValueError(f"pattern {pattern!r} has layers of multi-token prediction, which are not supported")
    found = [number for number, letter in enumerate(pattern.replace("|", ""), start=1) if letter == "*"]
    if not found:
        raise ValueError(f"pattern {pattern!r} has no attention layer (*)")
    return found


def kind_of(layers: tuple[LayerAttention, ...]) -> AttentionKind:
    """How a stage attends: `moba` if any of its layers does, else `full`."""
    return "moba" if any(layer.kind == "moba" for layer in layers) else "full"


def checked_schedule(config: Config) -> AttentionSchedule:
    """The attention schedule of a configuration.

    Raises:
        ConfigError: settings without effect, or blocks longer than the sequence, in any layer of any stage; an index
            that can learn nothing.
    """
    try:
        schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    length = config.data.sequence_length
    problems = [
        f"attention: layer {number} of stage {stage} has block_size = {layer.block_size}, over data.sequence_length = "
        f"{length}: use at most that"
        for stage, layers in enumerate(schedule.stages, start=1)
        for number, layer in enumerate(layers, start=1)
        if layer.block_size is not None and layer.block_size > length
    ]
    problems += without_effect(config.attention, schedule)
    sizes = [
        [None if layer.kind == "full" else (layer.block_size, layer.top_k) for layer in s] for s in schedule.stages
    ]
    problems += learning_problems(config, sizes)
    if problems:
        raise ConfigError(problems)
    return schedule


def without_effect(attention: AttentionConfig, schedule: AttentionSchedule) -> list[str]:
    """Settings of the section that no MoBA layer of its schedule has, each layer having its own or no use for them: a
    line for each. All go where a comparison makes every layer full."""
    if not any(kind_of(layers) == "moba" for layers in schedule.stages):
        return []
    problems = []
    for name in ("summary", "threshold", "share_selection"):
        value, default = getattr(attention, name), type(attention).model_fields[name].default
        other = value / 2 if isinstance(value, float) else default
        changed = attention.model_copy(update={name: other})
        if value != default and AttentionSchedule.from_config(changed, schedule.num_layers) == schedule:
            problems.append(f"attention.{name} = {value} has no effect: no MoBA layer uses it; take it out")
    return problems


def _to_list(layer: LayerAttention) -> list[Any]:
    """[kind, block_size, top_k], and how blocks are chosen where it is not plain MoBA."""
    settings: dict[str, Any] = layer.selection.settings
    if not layer.selection.shared:  # as it was written before heads could share
        settings.pop("share_selection")
    if layer.selection.budgets is not None:
        settings["budgets"] = list(layer.selection.budgets)
    chosen = [] if layer.selection.is_plain else [settings]
    return [layer.kind, layer.block_size, layer.top_k, *chosen]


def _from_list(values: list[Any]) -> LayerAttention:
    kind, block_size, top_k, *chosen = values
    return LayerAttention(kind, block_size, top_k, *(Selection(**settings) for settings in chosen))


def _stage_layers(attention: AttentionConfig, stage: AttentionStage, num_layers: int) -> tuple[LayerAttention, ...]:
    def setting(name: str) -> Any:
        own = getattr(stage, name)
        return getattr(attention, name) if own is None else own

    overrides = setting("layers")
    keeps_override_kinds = stage.kind is None or stage.layers is not None
    unknown = sorted(n for n in {*setting("full_layers"), *overrides} if not 1 <= n <= num_layers)
    if unknown:
        raise ValueError(f"attention names layers {unknown}: layers are counted from 1 to {num_layers}")
    every, last = setting("full_every_n"), setting("last_n_full")
    layers = []
    for number in range(1, num_layers + 1):
        full = number in setting("full_layers") or (every and number % every == 0) or number > num_layers - last
        kind = "full" if full else setting("kind")
        override = overrides.get(number)
        if override and override.kind and keeps_override_kinds:
            kind = override.kind
        if kind == "full":
            layers.append(FULL)
            continue
        block_size = override.block_size if override and override.block_size else setting("block_size")
        top_k = override.top_k if override and override.top_k else setting("top_k")
        selector = override.selector if override and override.selector else setting("selector")
        # The section's summary, threshold and sharing are those of the layers whose selector asks for them.
        summary = override.summary if override and override.summary else attention.summary
        threshold = override.threshold if override and override.threshold else attention.threshold
        selection = Selection.of_settings(selector, summary, threshold, attention.share_selection)
        layers.append(LayerAttention.moba(block_size, top_k, selection))
    return tuple(layers)


def _runs(layers: tuple[LayerAttention, ...]) -> list[tuple[int, int, LayerAttention]]:
    """Neighbouring equal layers as (first, last, what), counted from 1."""
    runs: list[tuple[int, int, LayerAttention]] = []
    for number, layer in enumerate(layers, start=1):
        if runs and runs[-1][2] == layer:
            runs[-1] = (runs[-1][0], number, layer)
        else:
            runs.append((number, number, layer))
    return runs
