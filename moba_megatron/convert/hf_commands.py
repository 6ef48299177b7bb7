"""`moba-megatron import-hf`, `import-megatron` and `export-hf`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moba_megatron.errors import user_errors

_VERIFY = "Compare the logits of both models in fp32, and fail if they differ."


@user_errors()
def import_command(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face folder: config.json, safetensors.")],
    out: Annotated[Path, typer.Argument(help="Run folder to make; it must not exist.")],
    check: Annotated[bool, typer.Option("--verify", help=_VERIFY)] = False,
    unread: Annotated[
        bool,
        typer.Option("--no-verify", help="Skip the check of the digests in our own exports."),
    ] = False,
    experts: Annotated[
        int | None,
        typer.Option(
            "--upcycle-experts",
            metavar="N",
            help="Turn a dense model into a mixture of N experts, each a copy of its feed-forward. Default: import it "
            "unchanged.",
        ),
    ] = None,
    experts_per_token: Annotated[
        int | None, typer.Option(help="With --upcycle-experts: experts that process a token. Default: 2.")
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="With --upcycle-experts: standard deviation of the noise on each expert's weights, in units of the "
            "standard deviation of the tensor. Default: 0; then the first logits equal those of the dense model."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="With --upcycle-experts: seed of routers and noise. Default: 1234.")
    ] = None,
) -> None:
    """Make a run folder from a Hugging Face model.

    OUT gets config.yaml, tokenizer/ and checkpoints/step_0. evaluate, generate, export-hf and model.init_from accept
    OUT. To train in another run folder: python train.py OUT/config.yaml run.dir=RUN data.train=PREFIX.

    A model that does not fit into the memory of one process needs no import: set model.init_from=HF_DIR in training.

    With noise, --verify compares the mixture with its own export, because its logits differ from those of HF_DIR.
    """
    from moba_megatron.convert.exported import open_exported
    from moba_megatron.convert.import_hf import import_huggingface
    from moba_megatron.convert.upcycle import asked_for
    from moba_megatron.convert.verify import verify_conversion, verify_own_export
    from moba_megatron.platform import stop_process_groups

    console = Console(highlight=False, soft_wrap=True)
    upcycling = asked_for(experts, experts_per_token=experts_per_token, noise=noise, seed=seed)
    with _progress(console, "parameters") as bar:
        _, notes = import_huggingface(source, out, verify=not unread, upcycling=upcycling, advance=bar.at)
    for line in notes:
        console.print(f"note: {line}", markup=False)
    console.print(str(out), markup=False)
    if check:
        stop_process_groups()
        exported = open_exported(out)
        if upcycling and upcycling.noise:
            verify_own_export(console, exported)
        else:
            verify_conversion(console, exported, source)


@user_errors()
def import_megatron_command(
    source: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="Folder iter_N (torch_dist), or the --save folder for its latest."),
    ],
    out: Annotated[Path, typer.Argument(help="Run folder to make; it must not exist.")],
    model: Annotated[
        Path,
        typer.Option(
            help="Description of the model: the Hugging Face folder that it started from, a run folder, or a YAML "
            "file with a `model` section."
        ),
    ],
    sequence_length: Annotated[int, typer.Option(min=2, help="Sequence length of its training, in tokens.")],
    attention: Annotated[
        Path | None,
        typer.Option(help="The attention settings: the file that MOBA_CONFIG named in training. Default: MOBA_CONFIG."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Hugging Face folder of the tokenizer. Default: that of --model.")
    ] = None,
) -> None:
    """Make a run folder from a checkpoint of Megatron-LM or Megatron-Bridge.

    Only the weights are read. With a schedule of several stages, MOBA_STAGE names the stage of the training. OUT is
    like that of import-hf: evaluate, generate, export-hf and model.init_from accept it.
    """
    from moba_megatron.convert.import_megatron import import_megatron

    console = Console(highlight=False, soft_wrap=True)
    with _progress(console, "parameters") as bar:
        _, notes = import_megatron(
            source,
            out,
            model=model,
            attention=attention,
            sequence_length=sequence_length,
            tokenizer=tokenizer,
            advance=bar.at,
        )
    for line in notes:
        console.print(f"note: {line}", markup=False)
    console.print(str(out), markup=False)


@user_errors()
def export_command(
    run: Annotated[
        Path, typer.Argument(help="Run folder (its newest checkpoint is used) or a checkpoint folder step_N.")
    ],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to make; it must not exist.")],
    decode: Annotated[
        Literal["full", "moba"],
        typer.Option(help="Attention of new tokens to the cache: full, as in the MoBA report, or moba."),
    ] = "full",
    self_contained: Annotated[
        bool,
        typer.Option(
            "--self-contained",
            help="Add the attention as a Python file, so that transformers needs trust_remote_code=True but not this "
            "package.",
        ),
    ] = False,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest text of the model in tokens (max_position_embeddings in config.json): engines refuse longer "
            "prompts. The number is not checked. Default: the larger of data.sequence_length in training and the "
            "window of the source model.",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer, if it was moved since the training.")
    ] = None,
    shard_gigabytes: Annotated[float, typer.Option(min=0.001, help="Largest file of weights, 10^9 bytes.")] = 4.0,
    check: Annotated[bool, typer.Option("--verify", help=_VERIFY)] = False,
    unread: Annotated[
        bool,
        typer.Option(
            "--no-verify",
            help="Skip the check of the checkpoint's digests (it is done unless checkpoint.verify is off).",
        ),
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face model. It needs no GPU."""
    from moba_megatron.convert.export_hf import export_huggingface
    from moba_megatron.convert.exported import open_exported
    from moba_megatron.convert.verify import verify_conversion

    console = Console(highlight=False, soft_wrap=True)
    exported = open_exported(run, tokenizer, own_code=self_contained)
    with _progress(console, "parameters") as bar:
        reader = export_huggingface(
            exported,
            out,
            decode=decode,
            self_contained=self_contained,
            length=length,
            shard_bytes=int(shard_gigabytes * 1e9),
            verify=not unread,
            advance=bar.at,
        )
    if exported.stored_indexes is not None and exported.indexes != exported.stored_indexes:
        used = exported.indexes.layers if exported.indexes else frozenset()
        left = ", ".join(str(number + 1) for number in sorted(exported.stored_indexes.layers - used))
        console.print(f"note: layers {left} attend fully at this step: their index of blocks is left out")
    if reader not in (None, "AutoTokenizer"):
        console.print(f"note: load the tokenizer by {reader}: AutoTokenizer would give other ids (see README.md)")
    console.print(str(out), markup=False)
    if check:
        verify_conversion(console, exported, out)


class _Bar(Progress):
    """A bar that is told how many of how many."""

    def at(self, done: int, total: int) -> None:
        self.update(self.task_ids[0], completed=done, total=total)


def _progress(console: Console, what: str) -> _Bar:
    bar = _Bar(TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), console=console)
    bar.add_task(what, total=None)
    return bar
