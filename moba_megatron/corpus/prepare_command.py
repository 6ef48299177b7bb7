"""`moba-megatron prepare RECIPE OUT`, `prepare merge`, `prepare inspect` and `prepare blend`: their command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moba_megatron.errors import user_errors, with_note


@user_errors(apart=True)
def prepare_command(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[RECIPE] OUT [KEY=VALUE]...",
            help="A recipe (YAML), the output folder, and overrides of the recipe such as tokenizer.vocab_size=8192. "
            "With --input or --dataset: the output folder, and overrides.",
        ),
    ],
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Text without a recipe: a file, a pattern or a folder of JSON Lines (.jsonl, .ndjson, .json, also "
            "with .gz, .zst, .bz2 or .xz; part-*), .parquet, .arrow or text files (of a folder, .txt). May be given "
            "several times. Quote patterns.",
        ),
    ] = None,
    kind: Annotated[
        Literal["files", "jsonl", "parquet", "arrow"] | None,
        typer.Option(help="Kind of every --input, whatever its ending."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Text without a recipe: a Hugging Face dataset, by name or local path.")
    ] = None,
    dataset_split: Annotated[str, typer.Option(help="Split of --dataset.")] = "train",
    text_column: Annotated[
        str | None, typer.Option(help="Column of text, for JSONL, Parquet and datasets. Default: text.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a Hugging Face tokenizer, for --input and --dataset.")
    ] = None,
    train_tokenizer: Annotated[
        int | None,
        typer.Option(metavar="ENTRIES", help="Instead of --tokenizer: train a byte-level BPE with this many entries."),
    ] = None,
    validation: Annotated[
        float, typer.Option(help="Share of the documents kept for validation, for --input and --dataset.")
    ] = 0.05,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="Processes. Default: all cores, if there is enough text. The result does not depend on it.",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Prepare only share I of N (I from 0), on one of N machines that see the same files. When all shares "
            "are done: moba-megatron prepare merge OUT.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another dataset in OUT, also an unfinished one.")
    ] = False,
) -> None:
    """Turn text into tokens that training reads.

    From a recipe, or directly from files:

        moba-megatron prepare data/python_stdlib.yaml data/prepared/python_stdlib

        moba-megatron prepare --input 'docs/*.jsonl.zst' --tokenizer DIR OUT filters.min_characters=200

    OUT gets train and validation data in megatron-core's indexed format, tokenizer/ and manifest.json.

    To continue a stopped run, repeat the command. On a finished dataset it does nothing.

    There are also `prepare merge` (join the shares of several machines), `prepare inspect` (show and check a dataset)
    and `prepare blend` (mix datasets by weight and length); each has its own --help.
    """
    from moba_megatron.corpus.direct import direct_sources, direct_tokenizer
    from moba_megatron.corpus.prepare import prepare, prepare_share
    from moba_megatron.corpus.recipe import load_recipe, recipe_from_dict

    with with_note("finished parts are kept; run the same command again to continue"):
        if input or dataset:
            if any("=" not in argument for argument in arguments[1:]):
                raise ValueError(
                    f"with --input or --dataset give one folder, OUT, and key=value, not {' '.join(arguments)}"
                )
            spec = direct_tokenizer(tokenizer, train_tokenizer)
            sources, lines = direct_sources(input or [], dataset, dataset_split, text_column, kind)
            for line in lines:
                typer.echo(line, err=True)
            values = {"sources": sources, "tokenizer": spec, "split": {"validation": validation}}
            recipe, output = recipe_from_dict(values, arguments[1:]), arguments[0]
        else:
            if len(arguments) < 2:
                raise ValueError("give a recipe and the folder to make, or --input or --dataset and the folder")
            recipe, output = load_recipe(arguments[0], arguments[2:]), arguments[1]
        if shard is not None:
            prepare_share(recipe, Path(output), parse_share(shard), workers, overwrite)
            return
        typer.echo(prepare(recipe, Path(output), workers, overwrite).summary())


@user_errors(apart=True)
def merge_command(
    out: Annotated[Path, typer.Argument(help="The output folder of the shares.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another dataset in OUT.")] = False,
) -> None:
    """Join the shares that `prepare RECIPE OUT --shard I/N` made on several machines.

    Refused until every share is done. The result is the same, byte for byte, as from one machine.
    """
    from moba_megatron.corpus.prepare import merge_shares

    with with_note("nothing is lost; run the same command again"):
        typer.echo(merge_shares(out, overwrite).summary())


@user_errors(apart=True)
def inspect_command(
    out: Annotated[Path, typer.Argument(help="Folder that `prepare` made.")],
    document: Annotated[int | None, typer.Option(help="Show this document of the split, counted from 0.")] = None,
    split: Annotated[str, typer.Option(help="Which split: train, validation, or a view of a blend.")] = "train",
    check: Annotated[
        bool, typer.Option("--check", help="Read all files and check sizes, hashes, index, loss mask and token ids.")
    ] = False,
) -> None:
    """Show the contents of a prepared dataset or one of its documents, or check all its files."""
    from moba_megatron.corpus.inspect import check_dataset, dataset_manifest, describe, read_document

    with with_note("run the same command again"):
        if document is not None:
            pieces = read_document(out, split, document)
            counted = sum(piece.tokens for piece in pieces if piece.counts)
            tokens = sum(piece.tokens for piece in pieces)
            typer.echo(f"document {document} of {split}: {tokens:,} tokens, {counted:,} of them count in the loss")
            for piece in pieces:
                if len(pieces) > 1:
                    typer.echo(f"--- {piece.tokens:,} tokens, {'learned' if piece.counts else 'not learned'}")
                typer.echo(piece.text)
        elif not check:
            typer.echo(describe(dataset_manifest(out)))
        if check:
            problems = 0
            for what, wrong in check_dataset(out):
                problems += wrong is not None
                typer.echo(f"{what}: {wrong or 'ok'}")
            if problems:
                typer.echo(f"error: {out} is damaged ({problems} problems)", err=True)
                raise typer.Exit(1)


@user_errors(apart=True)
def blend_command(
    recipe: Annotated[Path, typer.Argument(help="YAML file with datasets, their shares and lengths.")],
    out: Annotated[Path, typer.Argument(help="Output folder; train with data.train: OUT/blend.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the recipe.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another dataset in OUT.")] = False,
) -> None:
    """Mix prepared datasets by weight and by document length.

    Nothing is copied: OUT holds indices that point into the datasets.

        moba-megatron prepare blend data/long_mix.yaml data/prepared/long_mix
    """
    from moba_megatron.corpus.mix import make_blend
    from moba_megatron.corpus.mix_views import load_mix

    with with_note("run the same command again"):
        typer.echo(make_blend(load_mix(recipe, overrides), out, overwrite))


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
