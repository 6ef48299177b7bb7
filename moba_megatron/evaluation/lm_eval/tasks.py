"""A RULER-style set of tasks as files that EleutherAI's harness reads (the kinds of tasks of RULER, arXiv 2404.06654,
and its score: the share of the answers that the generated text contains).

For each task and length there are samples (JSONL) and a task file: `ruler_local_needle_4096`; a group for each length,
`ruler_local_4096`, and one over all, `ruler_local`, hold the means. The files serve the harness's own command as well:
`lm_eval --include_path FOLDER --tasks ruler_local`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.evaluation.tasks import TASKS, Sample, load_haystack, make_samples

RULER = "ruler_local"
METRIC = "answers_found"
_SCORE = "!function moba_megatron.evaluation.lm_eval.tasks.share_of_answers"
# A model may say something before the answer, or give several.
_ROOM, _MOST_NEW_TOKENS = 16, 64


@dataclass(frozen=True)
class RulerSettings:
    """Which samples to draw.

    Attributes:
        lengths: in tokens, of prompt and answer together.
        tasks: names out of `evaluation.tasks.TASKS`.
        samples: of each task at each length.
        haystack: what `load_haystack` takes; None: noise sentences.
        seed: of all samples.
    """

    lengths: tuple[int, ...]
    tasks: tuple[str, ...] = tuple(TASKS)
    samples: int = 20
    haystack: str | None = None
    seed: int = 0


def write_tasks(
    folder: Path,
    settings: RulerSettings,
    tokenizer: Tokenizer,
    *,
    window: int,
    template: int = 0,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Draw the samples and write the folder anew.

    Args:
        tokenizer: of the model.
        window: tokens that the model can take.
        template: tokens that the harness's tokenizer puts around a prompt (such as BOS).
        advance: told tasks drawn and in all, before each.

    Raises:
        ValueError: a length over the window or too short for a task, an unknown task or haystack.
    """
    if too_long := [length for length in settings.lengths if length > window]:
        raise ValueError(f"--ruler: lengths {too_long} are over the model's window of {window} tokens")
    if unknown := [name for name in settings.tasks if name not in TASKS]:
        raise ValueError(f"--ruler: no task {', '.join(unknown)}; there are {', '.join(TASKS)}")
    haystack = load_haystack(settings.haystack, tokenizer)
    drawn: dict[tuple[str, int], list[Sample]] = {}
    for length in settings.lengths:
        for name in settings.tasks:
            advance(len(drawn), len(settings.lengths) * len(settings.tasks))
            drawn[name, length] = make_samples(
                name,
                tokenizer=tokenizer,
                length=length - template - _ROOM,
                count=settings.samples,
                seed=settings.seed,
                haystack=haystack,
            )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for (name, length), samples in drawn.items():
        prompts = tokenizer.encode_batch([sample.prompt for sample in samples])
        room = min(length - template - len(ids) for ids in prompts)
        _write_task(folder, _task_name(name, length), samples, min(room, _MOST_NEW_TOKENS))
    for length in settings.lengths:
        _write_group(folder, f"{RULER}_{length}", [_task_name(name, length) for name in settings.tasks])
    _write_group(folder, RULER, [f"{RULER}_{length}" for length in settings.lengths])


def share_of_answers(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The harness's `process_results`: which share of the answers the generated text contains, in any case of letters.

    >>> share_of_answers({"answers": ["482", "Owl"]}, [" it is 482."])
    {'answers_found': 0.5}
    """
    text = results[0].lower()
    answers = document["answers"]
    return {METRIC: sum(answer.lower() in text for answer in answers) / len(answers)}


def _task_name(name: str, length: int) -> str:
    return f"{RULER}_{name}_{length}"


def _write_task(folder: Path, name: str, samples: list[Sample], new_tokens: int) -> None:
    data = (folder / f"{name}.jsonl").resolve()
    with data.open("w", encoding="utf-8") as stream:
        for sample in samples:
            row = {"prompt": sample.prompt, "answers": sample.answers, "target": sample.target, "depth": sample.depth}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    values = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"do_sample": False, "max_gen_toks": new_tokens, "until": []},
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    # A tag that YAML's writer would put in quotes.
    text = yaml.safe_dump(values, sort_keys=False) + f"process_results: {_SCORE}\n"
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def _write_group(folder: Path, name: str, members: list[str]) -> None:
    values = {
        "group": name,
        "task": members,
        "aggregate_metric_list": [{"metric": METRIC, "aggregation": "mean", "weight_by_size": False}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
