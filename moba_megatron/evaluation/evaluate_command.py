"""`moba-megatron evaluate`: what a trained model can do. Each part of it is a module of its own, imported when it is
asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moba_megatron.errors import one_door

DEPTHS = "0,0.25,0.5,0.75,1"


@one_door()
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
    samples: Annotated[int | None, typer.Option(min=1, help="Samples to evaluate. Default: as in training.")] = None,
    trailing: Annotated[
        int | None, typer.Option(min=1, help="Positions of the trailing loss, in tokens. Default: as in training.")
    ] = None,
    sequence_length: Annotated[
        str | None,
        typer.Option(help="Tokens of a sample of the losses and the routing (2048,8K,...). Default: as in training."),
    ] = None,
    losses: Annotated[
        bool | None, typer.Option("--losses/--no-losses", help="The losses. Default: if nothing else is asked for.")
    ] = None,
    losses_choice: Annotated[
        list[str] | None,
        typer.Option(
            help="B:K, or B:K:SELECTOR: what the same weights lose under MoBA of these sizes in all layers, or only in "
            "some (B:K@5, B:K:SELECTOR@0-26,29; counted from 0); also on a model that attends fully. Several times. "
            "Asks for the losses."
        ),
    ] = None,
    routing: Annotated[
        bool, typer.Option("--routing", help="What the MoBA layers choose, and how much of full attention it holds.")
    ] = False,
    routing_samples: Annotated[int, typer.Option(min=1, help="Validation samples of the routing report.")] = 4,
    routing_choice: Annotated[
        str | None,
        typer.Option(help="B:K, in place of the layers' own; also on a model that attends fully. Asks for --routing."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Synthetic long-range tasks, by commas, such as needle,multi_key; all: every one of them."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of the tasks' samples (1024,8K,...). Default: data.sequence_length of the run and its halves."
        ),
    ] = None,
    depths: Annotated[str, typer.Option(help="Where the decisive statement lies, 0 (start) to 1 (end).")] = DEPTHS,
    task_samples: Annotated[int, typer.Option(min=1, help="Samples of each task, length and depth.")] = 10,
    haystack: Annotated[
        str | None,
        typer.Option(
            help="Text around tasks and --ruler: a file, or the prefix of a prepared dataset. Default: noise sentences."
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            help="Tasks of EleutherAI's lm-evaluation-harness, by commas; also on a Hugging Face folder. The model "
            "attends as it was trained; --attention full or both for full attention of the same weights."
        ),
    ] = None,
    lm_eval_tasks: Annotated[Path | None, typer.Option(help="Folder of task files of your own.")] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(min=1, help="Samples of each task. Default: all.")] = None,
    lm_eval_batch: Annotated[int, typer.Option(min=1, help="Texts that the harness takes at a time.")] = 1,
    lm_eval_chat: Annotated[
        bool,
        typer.Option("--lm-eval-chat", help="Ask by the tokenizer's chat template, earlier examples as turns."),
    ] = False,
    lm_eval_system: Annotated[
        str | None, typer.Option(help="System message of --lm-eval-chat, for templates that take one.")
    ] = None,
    ruler: Annotated[
        str | None,
        typer.Option(help="Lengths (4K,8K,...) of a RULER-style task set, drawn here and run by lm-eval."),
    ] = None,
    ruler_samples: Annotated[int, typer.Option(min=1, help="Samples of each of its tasks at each length.")] = 20,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for results and pictures, such as of a model that may only be read. Default: RUN."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            " /--no-verify",
            show_default=False,
            help="Leave the digests of the files alone, which are read first unless checkpoint.verify is off.",
        ),
    ] = True,
) -> None:
    """Evaluate a trained model: losses (by position, trailing, against full attention of the same weights), or what
    the options ask for.

    Writes RUN/evaluation/*.json, a line each in RUN/evaluations.jsonl, pictures in RUN/plots, and to the trackers that
    the run has on; with --output, the files there and nothing to the trackers.
    """
    from rich.console import Console

    from moba_megatron.config.lengths import parse_length
    from moba_megatron.evaluation.attention_choice import parse_choice, parse_losses_choice
    from moba_megatron.evaluation.subject import open_subject
    from moba_megatron.evaluation.tasks.options import task_options
    from moba_megatron.runs.records import EvaluationRecords

    console = Console(highlight=False, soft_wrap=True)
    choice = parse_choice("--routing-choice", routing_choice) if routing_choice else None
    choices = [parse_losses_choice(text) for text in losses_choice or []]
    losses = True if choices else losses
    routing = routing or choice is not None
    options = None
    if tasks is not None:
        options = task_options(tasks, lengths=lengths, depths=depths, samples=task_samples, haystack=haystack)
    elif lengths is not None:
        raise ValueError(f"--lengths {lengths} without --tasks: name the tasks to run")
    elif haystack is not None and ruler is None:
        raise ValueError(f"--haystack {haystack} without --tasks or --ruler: name what it goes around")
    asked = (lm_eval, ruler, lm_eval_tasks, lm_eval_limit, lm_eval_system)
    harness = lm_eval_chat or any(option is not None for option in asked)
    wants_losses = losses or (losses is None and not routing and not options and not harness)
    of_losses = {"--samples": samples, "--trailing": trailing, "--validation": None if routing else validation}
    if sequence_length is not None and not wants_losses and not routing:
        raise ValueError(f"--sequence-length {sequence_length} without the losses or --routing: add --losses")
    unused = [name for name, value in of_losses.items() if value is not None]
    if unused and not wants_losses:
        raise ValueError(f"{', '.join(unused)} without the losses: add --losses")
    if harness:
        from moba_megatron.evaluation.lm_eval.run import evaluate_with_harness, harness_settings

        settings = harness_settings(
            lm_eval,
            lm_eval_tasks,
            limit=lm_eval_limit,
            batch_size=lm_eval_batch,
            ruler=ruler,
            samples=ruler_samples,
            haystack=haystack,
            chat=lm_eval_chat,
            system=lm_eval_system,
        )
        evaluate_with_harness(target, settings, console, attention=attention, output=output, verify=verify)
        if not wants_losses and not routing and not options:
            return
    if options and not wants_losses and not routing and (target / "config.json").is_file():
        from moba_megatron.evaluation.tasks.evaluate_tasks import evaluate_folder_tasks

        evaluate_folder_tasks(target, options, console, attention, output, verify=verify)
        return
    subject = open_subject(
        target,
        attention=attention,
        validation=validation,
        samples=samples,
        trailing_tokens=trailing,
        sequence_length=parse_length("--sequence-length", sequence_length) if sequence_length else None,
        on_validation=wants_losses or routing,
        output=output,
        verify=verify,
    )
    with EvaluationRecords(subject.folder, subject.config) as records:
        if wants_losses:
            from moba_megatron.evaluation.losses.evaluate_losses import evaluate_losses

            evaluate_losses(subject, records, console, choices)
        if routing:
            from moba_megatron.evaluation.routing.evaluate_routing import evaluate_routing

            evaluate_routing(subject, records, console, samples=routing_samples, choice=choice)
        if options:
            from moba_megatron.evaluation.tasks.asked import from_subject
            from moba_megatron.evaluation.tasks.evaluate_tasks import evaluate_tasks

            evaluate_tasks(from_subject(subject), options, records, console)
    console.print(f"  {subject.folder}")
