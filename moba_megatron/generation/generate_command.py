"""`moba-megatron generate`: text from a trained model, printed as it is generated."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moba_megatron.errors import user_errors


class Decode(StrEnum):
    full = "full"
    moba = "moba"


@user_errors()
def generate_command(
    source: Annotated[
        Path,
        typer.Argument(help="Run folder (its newest checkpoint is used), checkpoint folder or Hugging Face folder."),
    ],
    prompt: Annotated[str | None, typer.Option(help="Beginning of the text.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the prompt, UTF-8.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Largest number of new tokens.")] = 128,
    decode: Annotated[
        Decode | None,
        typer.Option(
            help="Attention of new tokens in MoBA layers: full (to all tokens, as in the MoBA report) or moba (to "
            "chosen blocks, as in training). Default: the setting in config.json; full for a checkpoint."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens that together have this probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    prefill_tokens: Annotated[
        int, typer.Option(min=3, help="Tokens of the prompt processed at a time; fewer need less memory.")
    ] = 4096,
    verify: Annotated[
        bool,
        typer.Option(
            " /--no-verify",
            show_default=False,
            help="Skip the check of the files' digests (it is done unless checkpoint.verify is off).",
        ),
    ] = True,
) -> None:
    """Continue a prompt. The text goes to standard output as it is generated. Standard error shows the model's
    attention."""
    from moba_megatron.generation.engine import continue_prompt
    from moba_megatron.generation.loading import load_generator
    from moba_megatron.generation.streaming import TextStream
    from moba_megatron.platform.command_ranks import one_process, ranks_end_together

    with ranks_end_together():
        one_process("generate")
    text = _prompt(prompt, prompt_file)
    generator = load_generator(source, decode and decode.value, verify=verify)
    typer.echo(f"attention: {generator.attention}", err=True)
    ids = generator.encode(text)
    stream = TextStream(generator.decode, _write)
    stream.put(ids)
    new = continue_prompt(
        generator.model,
        ids,
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_ids=generator.stop_ids,
        prefill_tokens=prefill_tokens,
    )
    for token in new:
        stream.put([token])
    stream.end()
    typer.echo()


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise ValueError("give either --prompt or --prompt-file")
    if file is None:
        return prompt
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {file} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
