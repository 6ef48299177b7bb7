"""`moba-megatron prepare merge`, `inspect` and `blend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moba_megatron.data.command import errors_reported


def merge_command(
    out: Annotated[Path, typer.Argument(help="The folder that the shares were prepared for.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another dataset in OUT.")] = False,
) -> None:
    """Join what `prepare RECIPE OUT --shard I/N` made on several machines.

    Refused until every share is done. The bytes are those that one machine would have made.
    """
    from moba_megatron.data.prepare import merge_shares

    with errors_reported("nothing is lost; run the same command again"):
        typer.echo(merge_shares(out, overwrite).summary())


def inspect_command(
    out: Annotated[Path, typer.Argument(help="Folder that `prepare` made.")],
    document: Annotated[int | None, typer.Option(help="Show this document of the split, counted from 0.")] = None,
    split: Annotated[str, typer.Option(help="Which split: train, validation, or a view of a blend.")] = "train",
    check: Annotated[
        bool, typer.Option("--check", help="Read all files: sizes, hashes, index against data, loss mask, ids.")
    ] = False,
) -> None:
    """Show what a prepared dataset holds, one of its documents, or whether it is whole."""
    from moba_megatron.data.inspect import check_dataset, dataset_manifest, describe, read_document

    with errors_reported("run the same command again"):
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


def blend_command(
    recipe: Annotated[Path, typer.Argument(help="Which datasets, in which shares, by which lengths (YAML).")],
    out: Annotated[Path, typer.Argument(help="Folder to make; data.train: OUT/blend.yaml reads it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the recipe.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another dataset in OUT.")] = False,
) -> None:
    """Mix prepared datasets by weight and by document length.

    Nothing is copied: OUT holds indices that point into the datasets.

        moba-megatron prepare blend data/long_mix.yaml data/prepared/long_mix
    """
    from moba_megatron.data.mix import load_mix, make_blend

    with errors_reported("run the same command again"):
        typer.echo(make_blend(load_mix(recipe, overrides), out, overwrite))
