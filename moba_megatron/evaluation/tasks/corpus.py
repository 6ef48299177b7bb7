"""Training data of the tasks: `python -m moba_megatron.evaluation.tasks.corpus OUT`.

OUT then holds `samples.jsonl`, one sample a line with `prompt` and `answer`; `tokenizer/`, a tokenizer that knows each
word of the tasks as one token, for models so small that learning to spell would be most of their work; and
`recipe.yaml` for `moba-megatron prepare`, with the loss on the answers only.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tokenizers
import typer
import yaml
from rich.progress import track
from tokenizers import models, pre_tokenizers

from moba_megatron.corpus.tokenizer import END_OF_DOCUMENT, Tokenizer
from moba_megatron.errors import user_errors
from moba_megatron.evaluation.tasks.compose import make_samples
from moba_megatron.evaluation.tasks.options import parse_lengths, parse_tasks
from moba_megatron.evaluation.tasks.puzzles import TASKS
from moba_megatron.evaluation.tasks.sample import Sample
from moba_megatron.evaluation.tasks.words import NAMES, NOISE, VALUES

_UNKNOWN = "<|unknown|>"
_PROBES = 8


class _Characters:
    """Counts characters: enough of a tokenizer to see each task's words."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(map(ord, text)) for text in texts]


def make_tokenizer(folder: Path) -> Tokenizer:
    """Write a tokenizer whose entries are the words and marks that the tasks use, in noise."""
    split = pre_tokenizers.Whitespace()
    probes = [make_samples(name, tokenizer=_Characters(), length=4000, count=_PROBES, seed=0) for name in TASKS]
    texts = [sample.prompt + sample.target for samples in probes for sample in samples]
    words = {word for text in [*texts, *NOISE, *NAMES, *VALUES] for word, _ in split.pre_tokenize_str(text)}
    entries = {word: number for number, word in enumerate([END_OF_DOCUMENT, _UNKNOWN, *sorted(words)])}
    backend = tokenizers.Tokenizer(models.WordLevel(entries, unk_token=_UNKNOWN))
    backend.add_special_tokens([END_OF_DOCUMENT])
    backend.pre_tokenizer = split
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_DOCUMENT, "unk_token": _UNKNOWN}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Tokenizer(folder)


def training_samples(
    names: list[str], lengths: list[int], tokens: int, tokenizer: Tokenizer, seed: int
) -> Iterator[list[Sample]]:
    """Samples of every task and length, in groups, of `tokens` tokens in all.

    A length's share of the tokens falls with its square root: a model learns what to look for on short samples, of
    which a row holds many, and where to look on long ones.
    """
    weights = [length**-0.5 for length in lengths]
    for name in names:
        for length, weight in zip(lengths, weights, strict=True):
            share = tokens / len(names) * weight / sum(weights)
            count = max(1, round(share / length))
            yield make_samples(
                name, tokenizer=tokenizer, length=length - _reserve(name, length, tokenizer), count=count, seed=seed
            )


def taught(sample: Sample) -> dict[str, str]:
    """A row of the corpus. The question is asked twice: the first answer has to be found; the second one is near, and
    teaches copying before the model finds anything."""
    question = sample.prompt.rsplit("\n", 1)[-1]
    return {"prompt": sample.prompt, "answer": f"{sample.target}.\n{question}{sample.target}"}


def _reserve(name: str, length: int, tokenizer: Tokenizer) -> int:
    """Tokens of a row beyond those of its sample: the second question and answer, and the end-of-document token. With
    this tokenizer they are as many in every sample of a task and length."""
    (probe,) = make_samples(name, tokenizer=tokenizer, length=length, count=1, seed=0)
    prompt, answer = tokenizer.encode_batch(list(taught(probe).values()))
    return len(prompt) + len(answer) + 1 - probe.length


@user_errors()
def main(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    tasks: Annotated[str, typer.Option(help="Tasks, by commas; all: every one of them.")] = "needle",
    lengths: Annotated[str, typer.Option(help="Tokens of a sample with its end-of-document token.")] = "64,128,256,512",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in all.")] = 4_200_000,
    seed: Annotated[int, typer.Option(help="Seed of the samples; evaluate takes 0.")] = 1,
) -> None:
    """Write samples of the synthetic tasks, to train on.

    Then: moba-megatron prepare OUT/recipe.yaml DATA
    """
    names, sizes = parse_tasks(tasks), parse_lengths(lengths)
    if out.exists():
        raise ValueError(f"{out} is there already: name another folder, or remove it")
    write_corpus(out, names, sizes, tokens, seed)


def write_corpus(out: Path, names: list[str], lengths: list[int], tokens: int, seed: int) -> None:
    """Make the folder `out`; see the module and `training_samples`. It is complete or not there.

    Raises:
        ValueError: a length in which a task does not fit.
    """
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _write(unfinished, out, names, lengths, tokens, seed)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(folder: Path, final: Path, names: list[str], lengths: list[int], tokens: int, seed: int) -> None:
    """Write what will be the folder `final`, and is named so in its recipe."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    groups = track(
        training_samples(names, lengths, tokens, tokenizer, seed),
        description="samples",
        total=len(names) * len(lengths),
        disable=not sys.stderr.isatty(),
    )
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        for samples in groups:
            for sample in samples:
                file.write(json.dumps(taught(sample)) + "\n")
    recipe = {
        "sources": [
            {
                "kind": "jsonl",
                "path": str(final / "samples.jsonl"),
                "prompt_column": "prompt",
                "answer_column": "answer",
            }
        ],
        "tokenizer": {"kind": "pretrained", "path": str(final / "tokenizer")},
        "split": {"validation": 0.02},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
