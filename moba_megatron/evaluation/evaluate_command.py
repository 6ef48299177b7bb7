"""`moba-megatron evaluate`: what a trained model can do. Each part is a folder with its own options. It is imported
only when the user asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moba_megatron.errors import user_errors
from moba_megatron.evaluation.lm_eval.flags import HarnessFlags
from moba_megatron.evaluation.losses.flags import LossesFlags
from moba_megatron.evaluation.option_groups import with_flags
from moba_megatron.evaluation.routing.flags import RoutingFlags
from moba_megatron.evaluation.tasks.flags import TasksFlags


@user_errors()
@with_flags(losses=LossesFlags, routing=RoutingFlags, tasks=TasksFlags, harness=HarnessFlags)
def evaluate_command(
    target: Annotated[
        Path, typer.Argument(help="Run folder (its newest checkpoint is used) or a checkpoint folder step_N.")
    ],
    attention: Annotated[
        str | None,
        typer.Option(help="moba, full or both, of the same weights. Default: both, if the model has MoBA layers."),
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="Prefix of indexed data to evaluate on. Default: the run's data.validation.")
    ] = None,
    sequence_length: Annotated[
        str | None,
        typer.Option(help="Tokens of a sample of the losses and the routing (2048,8K,...). Default: as in training."),
    ] = None,
    haystack: Annotated[
        str | None,
        typer.Option(
            help="Text around tasks and --ruler: a file, or the prefix of a prepared dataset. Default: noise sentences."
        ),
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            help="Under torchrun, the parallel sizes: tensor, pipeline, context, expert, expert_tensor, such as "
            "tensor=2,context=4. Default: those of the run. One process uses one rank."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results and pictures, for instance if the run folder is read-only. Default: RUN."
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            " /--no-verify",
            show_default=False,
            help="Skip the check of the files' digests. It is done unless checkpoint.verify is off.",
        ),
    ] = True,
    *,
    losses: LossesFlags,
    routing: RoutingFlags,
    tasks: TasksFlags,
    harness: HarnessFlags,
) -> None:
    """Evaluate a trained model: losses (by position, trailing, under MoBA and full attention), or what the options ask
    for.

    Writes RUN/evaluation/*.json, lines in RUN/evaluations.jsonl, pictures in RUN/plots, and to the run's trackers. With
    --output, writes the files there and nothing to the trackers.
    """
    from moba_megatron.platform.command_ranks import ranks_end_together

    with ranks_end_together():
        _evaluate(
            target,
            attention=attention,
            validation=validation,
            sequence_length=sequence_length,
            haystack=haystack,
            parallel=parallel,
            output=output,
            verify=verify,
            losses=losses,
            routing=routing,
            tasks=tasks,
            harness=harness,
        )


def _evaluate(
    target: Path,
    *,
    attention: str | None,
    validation: str | None,
    sequence_length: str | None,
    haystack: str | None,
    parallel: str | None,
    output: Path | None,
    verify: bool,
    losses: LossesFlags,
    routing: RoutingFlags,
    tasks: TasksFlags,
    harness: HarnessFlags,
) -> None:
    """The command, on one rank."""
    from rich.console import Console

    from moba_megatron.config.lengths import parse_length
    from moba_megatron.evaluation.subject import open_subject
    from moba_megatron.platform.command_ranks import one_process, speaks
    from moba_megatron.runs.records import EvaluationRecords

    console = Console(highlight=False, soft_wrap=True, quiet=not speaks())
    choices, choice, options = losses.choices(), routing.choice(), tasks.options(haystack)
    budget = routing.budget()
    if haystack is not None and options is None and harness.ruler is None:
        raise ValueError(f"--haystack {haystack} without --tasks or --ruler: name what it goes around")
    wants_losses = losses.wanted(other=routing.wanted or options is not None or harness.wanted)
    on_validation = wants_losses or routing.wanted
    if sequence_length is not None and not on_validation:
        raise ValueError(f"--sequence-length {sequence_length} without the losses or --routing: add --losses")
    unused = [*losses.unused(), *["--validation"] * (validation is not None and not routing.wanted)]
    if unused and not wants_losses:
        raise ValueError(f"{', '.join(unused)} without the losses: add --losses")
    no_model_here = not on_validation and (options is None or (target / "config.json").is_file())
    if parallel is not None and no_model_here:
        raise ValueError(f"--parallel {parallel} without the losses, --routing, or --tasks of a run: leave it out")
    if harness.wanted:
        one_process("evaluate --lm-eval (and --ruler)")
        from moba_megatron.evaluation.lm_eval.run import evaluate_with_harness

        settings = harness.settings(haystack)
        evaluate_with_harness(target, settings, console, attention=attention, output=output, verify=verify)
        if not on_validation and options is None:
            return
    if options is not None and no_model_here:
        one_process("evaluate --tasks of a Hugging Face folder")
        from moba_megatron.evaluation.tasks.evaluate_tasks import evaluate_folder_tasks

        evaluate_folder_tasks(target, options, console, attention, output, verify=verify)
        return
    subject = open_subject(
        target,
        attention=attention,
        validation=validation,
        samples=losses.samples,
        trailing_tokens=losses.trailing,
        sequence_length=parse_length("--sequence-length", sequence_length) if sequence_length else None,
        on_validation=on_validation,
        output=output,
        verify=verify,
        parallel=parallel,
        asked_for={
            **({"--samples": losses.samples} if wants_losses else {}),
            **({"--routing-samples": routing.routing_samples} if routing.wanted else {}),
        },
        say=console.print,
    )
    with EvaluationRecords(subject.folder, subject.config, writes=speaks()) as records:
        if wants_losses:
            from moba_megatron.evaluation.losses.evaluate_losses import evaluate_losses

            evaluate_losses(subject, records, console, choices)
        if routing.wanted:
            from moba_megatron.evaluation.routing.evaluate_routing import evaluate_routing

            of = {"samples": routing.routing_samples, "choice": choice, "budget": budget}
            evaluate_routing(subject, records, console, **of)
        if options is not None:
            from moba_megatron.evaluation.tasks.asked import from_subject
            from moba_megatron.evaluation.tasks.evaluate_tasks import evaluate_tasks

            evaluate_tasks(from_subject(subject), options, records, console)
    console.print(f"  {subject.folder}")
