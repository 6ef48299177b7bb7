"""EleutherAI's lm-evaluation-harness on a trained model: `moba-megatron evaluate TARGET --lm-eval TASKS`.

A checkpoint is exported into its run folder first, so the evaluated model is the one that others load. The model uses
the attention of its training and decodes as its `moba_config` says, and the command checks that it does. With
`--attention full` the same weights use full attention. Your own task files and local data need no network.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moba_megatron.config import Config
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.run_exports import export_in_run
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.evaluation.attention_choice import chosen_attentions
from moba_megatron.evaluation.lm_eval.tasks import RULER, RulerSettings, write_tasks
from moba_megatron.evaluation.tasks.options import parse_lengths
from moba_megatron.generation.loading import load_huggingface, load_tokenizer
from moba_megatron.hf import NAME, MoBASettings, check_attends
from moba_megatron.hf.probe import has_moba_layers
from moba_megatron.runs.files import read_json
from moba_megatron.runs.folder import RunFolder
from moba_megatron.runs.records import EvaluationRecords

KIND = "lm_eval"


@dataclass(frozen=True)
class HarnessSettings:
    """What to run.

    Attributes:
        tasks: names of tasks, groups or tags.
        folder: task files of one's own; names found there need none of the harness's own.
        ruler: task set to generate and run as well.
        limit: samples of each task; None: all.
        batch_size: texts at a time.
        chat: ask by the tokenizer's chat template.
        system: the system message then.
    """

    tasks: tuple[str, ...] = ()
    folder: Path | None = None
    ruler: RulerSettings | None = None
    limit: int | None = None
    batch_size: int = 1
    chat: bool = False
    system: str | None = None


def harness_settings(
    tasks: str | None,
    folder: Path | None,
    *,
    limit: int | None,
    batch_size: int,
    ruler: str | None,
    samples: int,
    haystack: str | None,
    chat: bool = False,
    system: str | None = None,
) -> HarnessSettings:
    """Settings from the options of the command; `samples` and `haystack` are those of the RULER-style set."""
    if not tasks and not ruler:
        given = {"--lm-eval-tasks": folder, "--lm-eval-limit": limit, "--lm-eval-chat": chat or None}
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise ValueError(f"{' and '.join(unused)} without --lm-eval or --ruler: name the tasks to run")
    if system is not None and not chat:
        raise ValueError("--lm-eval-system without --lm-eval-chat: only a chat template writes a system message")
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    drawn = None
    if ruler:
        try:
            drawn = RulerSettings(tuple(parse_lengths(ruler)), samples=samples, haystack=haystack)
        except ValueError as error:
            raise ValueError(f"--ruler {ruler}: {error}") from error
    return HarnessSettings(names, folder, drawn, limit, batch_size, chat, system)


@dataclass(frozen=True)
class _Target:
    """An exported model, and where results go."""

    model: Path
    folder: RunFolder
    step: int | None = None
    tokens: int | None = None
    config: Config | None = None


def evaluate_with_harness(
    target: Path,
    settings: HarnessSettings,
    console: Console,
    *,
    attention: str | None = None,
    output: Path | None = None,
    verify: bool = True,
) -> list[Path]:
    """Run tasks on a run folder, a checkpoint or a Hugging Face folder, and record the results there.

    Args:
        attention: `moba`, `full` or `both`; None: as the model has it.
        output: where results go; None: to the run, or to the Hugging Face folder.
        verify: as for `load_huggingface`; of a checkpoint, as for `export_in_run`.

    Returns:
        The files written.

    Raises:
        ValueError: the harness is not installed, unknown tasks, an attention that the model does not have, texts longer
            than its window, or a model that would not attend as it says.
        CheckpointError: nothing to evaluate.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install 'moba-megatron[lm-eval]'")
    found = _open_target(target, console, output, verify)
    tokenizer = _load(load_tokenizer, found.model)
    if settings.chat and not tokenizer.chat_template:
        raise ValueError(f"--lm-eval-chat: the tokenizer of {target} has no chat template")
    names, folders = list(settings.tasks), [settings.folder] if settings.folder else []
    if settings.ruler:
        folders.append(found.folder.evaluation / RULER)
        _draw_ruler(folders[-1], settings.ruler, found.model, tokenizer, console)
        names.append(RULER)
    manager = _task_manager(names, folders)
    model, line = _load(lambda folder: load_huggingface(folder, verify=verify), found.model)
    console.print(f"attention of the model: {line}", markup=False)
    files, results = [], {}
    with EvaluationRecords(found.folder, found.config) as records:
        for kind in chosen_attentions(attention, has_moba_layers(model), unasked="moba"):
            results[kind] = _run(model, kind, tokenizer, manager, names, settings, console)
            files.append(_record(records, found, kind, results[kind], settings.limit))
    _print(console, results)
    for file in files:
        console.print(f"  {file}", markup=False)
    return files


def _open_target(target: Path, console: Console, output: Path | None, verify: bool) -> _Target:
    is_model = (target / "config.json").is_file()
    exported = None if is_model else open_exported(target)
    folder = RunFolder(output or target) if exported is None or output else RunFolder.of(exported.checkpoint)
    if output:
        output.mkdir(parents=True, exist_ok=True)
    if not os.access(folder.path, os.W_OK):
        raise ValueError(f"{folder} cannot be written to, and results go there: name another folder with --output")
    if exported is None:
        return _Target(target, folder)
    with console.status("exporting"):
        model = export_in_run(exported, folder, verify=verify)
    return _Target(model, folder, exported.manifest.step, exported.manifest.tokens, exported.config)


def _load(read: Callable[[Path], Any], folder: Path) -> Any:
    try:
        return read(folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error


def _draw_ruler(folder: Path, ruler: RulerSettings, model: Path, tokenizer: Any, console: Console) -> None:
    window = json.loads((model / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    template = tokenizer.num_special_tokens_to_add()
    with console.status("drawing samples") as status:

        def advance(done: int, total: int) -> None:
            status.update(f"drawing samples: {done} of {total} tasks")

        write_tasks(folder, ruler, Tokenizer(model), window=window, template=template, advance=advance)


def _task_manager(names: list[str], folders: list[Path]) -> Any:
    """The harness's index of tasks; all data of the named ones can be loaded.

    Raises:
        ValueError: an unknown name, or data that cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--lm-eval-tasks {folder}: no such folder")
    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        # The harness's own tasks are ten thousand files, read only where one is asked for.
        manager = TaskManager(include_path=[str(folder) for folder in folders])
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks)
            hint = f"; close names: {', '.join(close)}" if close else ""
            raise ValueError(f"--lm-eval: no task, group or tag {name!r}{hint}. --lm-eval-tasks names your own folder")
    try:
        manager.load(names)
    except OSError as error:
        raise ValueError(f"the data of {', '.join(names)} cannot be loaded: {error}") from error
    return manager


def _covered(model: Any) -> int | None:
    """Tokens up to which MoBA is full attention in this model; None if no layer attends by MoBA."""
    return MoBASettings.from_config(model.config).covered


def _run(
    model: Any,
    attention: str,
    tokenizer: Any,
    manager: Any,
    names: list[str],
    settings: HarnessSettings,
    console: Console,
) -> dict[str, dict[str, Any]]:
    """Results by task or group: metrics, samples, version."""
    from lm_eval import simple_evaluate

    from moba_megatron.evaluation.lm_eval.model import HarnessModel

    model.set_attn_implementation(NAME if attention == "moba" else "sdpa")
    if attention == "moba":
        check_attends(model)
    harness = HarnessModel(model, tokenizer, settings.batch_size)
    console.print(f"evaluating {', '.join(names)} under {attention} attention", markup=False)
    found = simple_evaluate(
        harness,
        tasks=names,
        limit=settings.limit,
        task_manager=manager,
        log_samples=False,
        apply_chat_template=settings.chat,
        fewshot_as_multiturn=settings.chat,
        system_instruction=settings.system,
    )
    if attention == "moba" and harness.longest <= _covered(model):
        console.print(
            f"note: no text was longer than {harness.longest} tokens; up to {_covered(model)} (block_size * top_k) "
            "MoBA is full attention",
            markup=False,
        )
    return {
        name: {
            "metrics": {
                key.removesuffix(",none"): value
                for key, value in values.items()
                if isinstance(value, int | float) and key != "sample_len"
            },
            "samples": found["n-samples"].get(name),
            "shots": found["n-shot"].get(name),
            "version": found["versions"].get(name),
            "limit": settings.limit,
            **({"chat_template": True, "system": settings.system} if settings.chat else {}),
        }
        for name, values in found["results"].items()
    }


def _record(
    records: EvaluationRecords, target: _Target, attention: str, results: dict[str, dict[str, Any]], limit: int | None
) -> Path:
    """Write the results; those of other tasks that the file holds stay in it."""
    name = f"{KIND}_{'' if target.step is None else f'step_{target.step}_'}{attention}"
    path = target.folder.evaluation / f"{name}.json"
    before = (read_json(path, needs=("tasks",)) or {"tasks": {}})["tasks"]
    numbers = {f"{task}/{key}": value for task, entry in results.items() for key, value in entry["metrics"].items()}
    return records.write(
        KIND,
        step=target.step,
        tokens=target.tokens,
        attention=attention,
        values={"tasks": {**before, **results}},
        summary={"limit": limit, **numbers},
        name=name,
    )


def _print(console: Console, results: dict[str, dict[str, dict[str, Any]]]) -> None:
    table = Table("task", "metric", *results)
    first = next(iter(results.values()))
    for task, entry in first.items():
        for metric in entry["metrics"]:
            if "_stderr" not in metric:
                values = (results[attention][task]["metrics"][metric] for attention in results)
                table.add_row(task, metric, *(f"{value:.4f}" for value in values))
    console.print(table)
