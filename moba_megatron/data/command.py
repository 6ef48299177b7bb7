"""`moba-megatron prepare RECIPE OUT`: the command line of `prepare`. Its sub-commands are in `subcommands`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from moba_megatron.config import ConfigError

_WILD = "*?["


def prepare_command(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[RECIPE] OUT [KEY=VALUE]...",
            help="A recipe (YAML), the folder to make, and overrides of the recipe such as "
            "tokenizer.vocab_size=8192. With --input or --dataset: only the folder to make.",
        ),
    ],
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Text without a recipe: a glob of .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .arrow files, a glob of "
            "text files, or a folder of .txt files. May be given several times. Quote globs.",
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Text without a recipe: a Hugging Face dataset, by name or local path.")
    ] = None,
    dataset_split: Annotated[str, typer.Option(help="Split of --dataset.")] = "train",
    text_column: Annotated[str, typer.Option(help="Column of text, for JSONL, Parquet and datasets.")] = "text",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a Hugging Face tokenizer, for --input and --dataset.")
    ] = None,
    train_tokenizer: Annotated[
        int | None,
        typer.Option(metavar="ENTRIES", help="Instead of --tokenizer: train a byte-level BPE of so many entries."),
    ] = None,
    validation: Annotated[
        float, typer.Option(help="Share of the documents kept for validation, for --input and --dataset.")
    ] = 0.05,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes. Default: all cores, if there is enough text. The result does not depend on it."
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Do share I of N only (I from 0), as one of N processes on machines that see the same files. When all "
            "are done: moba-megatron prepare merge OUT.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another dataset, or unfinished work on one, in OUT.")
    ] = False,
) -> None:
    """Turn text into tokens that training reads.

    By a recipe, or directly from files:

        moba-megatron prepare data/python_stdlib.yaml data/prepared/python_stdlib

        moba-megatron prepare --input 'docs/*.jsonl.zst' --tokenizer DIR OUT

    OUT gets train and validation data in megatron-core's indexed format, tokenizer/ and manifest.json.

    A run that was stopped continues where it was. Running it again when all is there does nothing.

    There are also `prepare merge` (join the shares of several machines), `prepare inspect` (show and check a dataset)
    and `prepare blend` (mix datasets by weight and length); each has its own --help.
    """
    from moba_megatron.data.prepare import prepare, prepare_share
    from moba_megatron.data.recipe import load_recipe, recipe_from_dict

    with errors_reported("finished parts are kept; run the same command again to continue"):
        if input or dataset:
            if len(arguments) != 1:
                raise ValueError(f"with --input or --dataset give one folder, OUT, not {' '.join(arguments)}")
            sources = direct_sources(input or [], dataset, dataset_split, text_column)
            spec = direct_tokenizer(tokenizer, train_tokenizer)
            recipe = recipe_from_dict({"sources": sources, "tokenizer": spec, "split": {"validation": validation}})
            output = arguments[0]
        else:
            if len(arguments) < 2:
                raise ValueError("give a recipe and the folder to make, or --input or --dataset and the folder")
            recipe, output = load_recipe(arguments[0], arguments[2:]), arguments[1]
        if shard is not None:
            prepare_share(recipe, Path(output), parse_share(shard), workers, overwrite)
            return
        typer.echo(prepare(recipe, Path(output), workers, overwrite).summary())


@contextmanager
def errors_reported(after_failure: str) -> Iterator[None]:
    """Turn errors into a line and an exit code: 2 for what the user can mend, 1 for the system, 130 for Ctrl-C.

    Args:
        after_failure: what to do after an error of the system.
    """
    try:
        yield
    except ConfigError as error:
        typer.echo("\n".join(f"error: {line}" for line in error.problems), err=True)
        raise typer.Exit(2) from error
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except (OSError, BrokenProcessPool) as error:
        typer.echo(f"error: {error}\n{after_failure}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo(f"stopped; {after_failure}", err=True)
        raise typer.Exit(130) from error


def parse_share(text: str) -> tuple[int, int]:
    """(number, shares) of `I/N`.

    >>> parse_share("0/4")
    (0, 4)

    Raises:
        ValueError: anything else.
    """
    number, slash, shares = text.partition("/")
    if not (slash and number.isdecimal() and shares.isdecimal() and int(number) < int(shares)):
        raise ValueError(f"--shard {text}: give I/N with I from 0 to N - 1, such as 0/4, 1/4, 2/4, 3/4")
    return int(number), int(shares)


def direct_sources(
    inputs: list[str], dataset: str | None, dataset_split: str, text_column: str
) -> list[dict[str, Any]]:
    """Sources of a recipe from the flags of the command line."""
    sources: list[dict[str, Any]] = []
    for path in inputs:
        name = path.removesuffix(".gz").removesuffix(".zst")
        if name.endswith((".jsonl", ".json")):
            sources.append({"kind": "jsonl", "path": path, "text_column": text_column})
        elif name.endswith((".parquet", ".arrow")):
            sources.append({"kind": Path(name).suffix[1:], "path": path, "text_column": text_column})
        else:
            sources.append({"kind": "files", **_folder_and_pattern(path)})
    if dataset:
        sources.append(
            {"kind": "datasets", "path": dataset, "dataset_split": dataset_split, "text_column": text_column}
        )
    return sources


def direct_tokenizer(folder: Path | None, entries: int | None) -> dict[str, Any]:
    """Tokenizer of a recipe from the flags of the command line.

    Raises:
        ValueError: both or neither given.
    """
    if (folder is None) == (entries is None):
        raise ValueError("give either --tokenizer DIR or --train-tokenizer ENTRIES")
    return {"kind": "bpe", "vocab_size": entries} if folder is None else {"kind": "pretrained", "path": str(folder)}


def _folder_and_pattern(path: str) -> dict[str, str]:
    parts = Path(path).parts
    fixed = next((number for number, part in enumerate(parts) if any(c in part for c in _WILD)), None)
    if fixed is None:
        if Path(path).is_file():
            return {"path": str(Path(path).parent), "pattern": Path(path).name}
        return {"path": path}
    return {"path": str(Path(*parts[:fixed])) if fixed else ".", "pattern": "/".join(parts[fixed:])}
