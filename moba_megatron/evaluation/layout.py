"""The parallel layout of an evaluation: from `--parallel`, or that of the run.

A checkpoint loads at any layout, so the sizes of training are only a default. The rest follows from the run: sequence
parallelism if the run had it (and with experts, which need it), uneven pipeline stages if the layers do not divide, no
interleaving.
"""

from __future__ import annotations

from typing import Any, get_args

from moba_megatron.config import Config, ConfigError, Exchange, ParallelConfig, check_world
from moba_megatron.config.checks import combination_problems
from moba_megatron.config.words import one_of
from moba_megatron.model.exchange_choice import resolve_exchange

SIZES = ("tensor", "pipeline", "context", "expert", "expert_tensor")
OPTION = "--parallel"


def evaluation_layout(config: Config, own: ParallelConfig, asked: str | None, ranks: int) -> ParallelConfig:
    """The layout of an evaluation.

    Args:
        config: of the run, on one rank, with the samples that are asked for.
        own: the run's own layout.
        asked: `tensor=2,context=4`, sizes that are not named being 1; None: the run's own sizes, and one rank where
            there is one process.
        ranks: processes of the command.

    Raises:
        ValueError: sizes that do not fit the model, the samples or the number of processes, with those that do.
    """
    given = _parsed(asked) if asked is not None else {}
    if asked is None and ranks > 1:
        given = {name: getattr(own, name) for name in SIZES}
    layout = _complete(config, own, given)
    told = f"{OPTION} {asked}" if asked is not None else f"the run's own sizes on {ranks} processes"
    sizes = {"global_batch_size": ranks, "micro_batch_size": 1}
    sizes |= {"recompute": "none", "recompute_layers": None, "offload": []}
    training = config.training.model_copy(update=sizes)
    tried = config.model_copy(update={"parallel": layout, "training": training})
    before = combination_problems(config)
    problems = [problem for problem in combination_problems(tried) if problem not in before]
    try:
        if not problems:
            check_world(tried, ranks)
            resolve_exchange(tried)
    except ConfigError as error:
        problems = error.problems
    if problems:
        fix = "" if asked is not None else f"; or give other sizes, such as {OPTION} context={ranks}"
        raise ValueError(f"{told}: {'; '.join(problems)}{fix}")
    return layout


def _parsed(text: str) -> dict[str, Any]:
    """Keys of `parallel` with their values, from `tensor=2,context=4`."""
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if name in SIZES and value.isdecimal() and int(value) > 0:
            found[name] = int(value)
        elif name == "sequence" and value in ("true", "false"):
            found[name] = value == "true"
        elif name == "exchange" and value in get_args(Exchange):
            found[name] = value
        else:
            raise ValueError(
                f"{OPTION} {text}: {part!r} is none of {one_of([f'{size}=N' for size in SIZES])}, sequence=true, "
                f"exchange=NAME ({one_of(get_args(Exchange))})"
            )
    return found


def _complete(config: Config, own: ParallelConfig, given: dict[str, Any]) -> ParallelConfig:
    """A layout of these sizes; what is not said is as the run had it, where that still has a meaning."""
    tensor, pipeline, context = (given.get(name, 1) for name in ("tensor", "pipeline", "context"))
    kept: dict[str, Any] = {}
    if context > 1:
        kept["exchange"] = own.exchange
        kept["hierarchical_context"] = own.hierarchical_context if own.context == context else None
    if config.model.num_moe_experts is not None:
        kept["expert_dispatcher"] = own.expert_dispatcher
    kept["sequence"] = tensor > 1 and (own.sequence or config.model.num_moe_experts is not None)
    if pipeline > 1:
        kept["pipeline_layers"] = _stage_layers(config, own, pipeline)
    if "exchange" in given:
        kept["hierarchical_context"] = None
    return ParallelConfig.model_validate({**kept, **given})


def _stage_layers(config: Config, own: ParallelConfig, stages: int) -> list[int] | None:
    """Layers of each pipeline stage: as many as in training, else the same number everywhere as far as it goes."""
    layers = config.model.num_layers
    if own.pipeline == stages and own.pipeline_layers:
        return [sum(own.pipeline_layers[stage::stages]) for stage in range(stages)]
    if stages > layers:
        raise ValueError(f"{OPTION} pipeline={stages}: the model has {layers} layers; use at most {layers} stages")
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]
