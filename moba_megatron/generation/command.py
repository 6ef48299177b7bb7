"""`moba-megatron generate`: text from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moba_megatron.checkpoint.manifest import CheckpointError
from moba_megatron.checkpoint.opened import find_checkpoint, open_model, saved_config
from moba_megatron.data.tokenizer import Tokenizer
from moba_megatron.generation.sampling import generate


def generate_command(
    run: Annotated[
        Path, typer.Argument(help="Run folder (its newest checkpoint is used) or a checkpoint folder step_N.")
    ],
    prompt: Annotated[str, typer.Option(help="Beginning of the text.")],
    tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens with this share of probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a prompt. The text goes to standard output."""
    try:
        tokenizer = Tokenizer(saved_config(find_checkpoint(run)).data.tokenizer)
        opened = open_model(run, tokenizer.fingerprint, tokenizer.vocab_size)
        ids = tokenizer.encode_batch([prompt])[0]
        new = generate(
            opened.model[0],
            ids,
            max_new_tokens=tokens,
            vocab_size=tokenizer.vocab_size,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_id=tokenizer.eod_id,
        )
    except (CheckpointError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(tokenizer.decode(ids + new))
