"""`moba-megatron bench`: speed and memory of MoBA and full attention, of the exchanges of context parallelism and of
generation; estimated times of the GPU kernels.

`python -m moba_megatron.benchmark.bench_command` does the same and needs only torch, rich, typer and matplotlib.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moba_megatron.before_torch import wait_briefly
from moba_megatron.benchmark.settings import BenchRouter, BenchSettings
from moba_megatron.errors import user_errors

DEFAULTS = BenchSettings()
_NOT_FOR_DECODE = ("dtypes", "inputs", "modes", "backend", "full", "preset", "context_parallel", "tune", "model")


@user_errors()
def bench_command(
    context: typer.Context,
    lengths: Annotated[str, typer.Option(help="Lengths in tokens, by commas; 32K means 32768.")] = "2K,4K,8K,16K,32K",
    blocks: Annotated[str, typer.Option(help="Pairs of block size and top-k: B:K, by commas.")] = "512:3",
    dtypes: Annotated[str, typer.Option(help="Out of fp32, bf16, fp16, fp64, by commas.")] = "fp32,bf16",
    modes: Annotated[str, typer.Option(help="fwd, fwd+bwd or both, by commas.")] = "fwd,fwd+bwd",
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = DEFAULTS.num_heads,
    groups: Annotated[int, typer.Option(min=1, help="Key/value heads.")] = DEFAULTS.num_kv_heads,
    head_size: Annotated[int, typer.Option(min=1, help="Size of a head.")] = DEFAULTS.head_size,
    backend: Annotated[str, typer.Option(help="auto, reference, gathered, triton or flash_moba.")] = "auto",
    full: Annotated[
        str, typer.Option(help="Full-attention backends by commas; the fastest is the baseline; none: MoBA alone.")
    ] = "torch",
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each side; medians are reported.")] = DEFAULTS.runs,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores.")] = 0,
    inputs: Annotated[
        str,
        typer.Option(
            help="What queries choose: random, sink (the first block), hot (a few blocks) or local (near ones)."
        ),
    ] = "random",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    router_dim: Annotated[
        int | None,
        typer.Option(
            help="Choose blocks by a router of this head size (attention.router: index). Measures its choice, and its "
            "loss in fwd+bwd, but not its projections. All key heads have one K. Not with --context-parallel, "
            "--decode, --model, --tune, flash_moba or --preset targets."
        ),
    ] = None,
    router_heads: Annotated[str, typer.Option(help="key or query: as attention.router_heads.")] = "key",
    router_keys: Annotated[str, typer.Option(help="shared or key: as attention.router_keys.")] = "shared",
    router_loss: Annotated[str, typer.Option(help="none, sparse or dense: as attention.router_loss.")] = "sparse",
    preset: Annotated[
        str | None,
        typer.Option(
            help="targets (CPU, with floor and goal), real (a layer of SmolLM2-135M), gpu (8K to 1M), gpu-128k."
        ),
    ] = None,
    model: Annotated[
        bool, typer.Option("--model", help="Print estimated times on GPUs instead; nothing is measured.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Search faster tiles of the GPU kernels instead (tile_table.py).")
    ] = False,
    context_parallel: Annotated[
        int | None,
        typer.Option(
            min=1, help="Measure the exchanges of this many context-parallel ranks instead (context.csv, ...)."
        ),
    ] = None,
    decode: Annotated[
        bool,
        typer.Option(
            "--decode",
            help="Measure steps of generation and the prefill instead, fp32 on the CPU (decode.csv). Takes --lengths, "
            "--blocks (one pair), --heads, --groups, --head-size, --runs, --threads and --output.",
        ),
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for bench.csv, bench.md and bench.png.")] = Path("bench"),
) -> None:
    """Measure MoBA and full causal attention in the same process, routing included.

    With --context-parallel C: bytes and seconds of each exchange over C ranks, which are started on this machine unless
    torchrun has started them. Settings with a wrong result get no speed.
    """
    if decode:
        _refuse_ignored(context)
    others = {"--decode": decode, "--model": model, "--tune": tune, "--context-parallel": context_parallel is not None}
    _refuse_router(context, router_dim, [name for name, given in others.items() if given])

    import torch
    from rich.console import Console

    console = Console(soft_wrap=True)
    if model:
        from moba_megatron.benchmark.expected import run_model

        run_model(output, console)
        return
    settings = BenchSettings(
        lengths=tuple(_tokens(text) for text in lengths.split(",")),
        blocks=tuple(_block(text) for text in blocks.split(",")),
        dtypes=tuple(dtypes.split(",")),
        modes=tuple(modes.split(",")),
        num_heads=heads,
        num_kv_heads=groups,
        head_size=head_size,
        backend=backend,
        full=() if full == "none" else tuple(full.split(",")),
        runs=runs,
        threads=threads,
        inputs=inputs,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        router=None if router_dim is None else BenchRouter(router_dim, router_heads, router_keys, router_loss),
    )
    if tune:
        from moba_megatron.benchmark.tune import run_tune

        run_tune(replace(settings, backend="triton"), output, console)
        return
    if decode:
        from moba_megatron.benchmark.decoding import decode_settings, run_decode_bench

        run_decode_bench(decode_settings(settings), output, console)
        return
    if context_parallel is not None:
        from moba_megatron.benchmark.exchanges import run_context_bench

        wrong = run_context_bench(settings, context_parallel, output, console).wrong
        _show(output, "context")
        if wrong:
            raise typer.Exit(1)
        return
    from moba_megatron.benchmark.operator import run_bench

    result = run_bench(settings, output, preset=preset, console=console)
    _show(output, "bench")
    if result.refused:
        raise typer.Exit(1)


def _refuse_ignored(context: typer.Context) -> None:
    """Exit code 2 if options are given that --decode would ignore."""
    options = _given(context, _NOT_FOR_DECODE)
    if options:
        typer.echo(f"error: --decode measures in fp32, and only steps and the prefill: leave out {options}", err=True)
        raise typer.Exit(2)


def _refuse_router(context: typer.Context, dim: int | None, others: list[str]) -> None:
    """Exit code 2 if the options of a router would be ignored."""
    options = _given(context, ("router_heads", "router_keys", "router_loss"))
    if dim is None and options:
        typer.echo(f"error: {options} without a router: add --router-dim", err=True)
        raise typer.Exit(2)
    if dim is not None and others:
        typer.echo(f"error: --router-dim is not measured with {', '.join(others)}: leave one of them out", err=True)
        raise typer.Exit(2)


def _given(context: typer.Context, names: tuple[str, ...]) -> str:
    """The options among these that are on the command line."""
    source = context.get_parameter_source
    given = [name for name in names if getattr(source(name), "name", "") == "COMMANDLINE"]
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def _show(output: Path, name: str) -> None:
    for suffix in ("csv", "md", "png"):
        typer.echo(f"  {output / name}.{suffix}")


def _tokens(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KM]?)", text.strip())
    if not match:
        raise ValueError(f"--lengths: {text!r} is not a number of tokens such as 4096 or 32K")
    return int(match[1]) * {"": 1, "K": 2**10, "M": 2**20}[match[2]]


def _block(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if not match:
        raise ValueError(f"--blocks: {text!r} is not a pair of block size and top-k such as 512:3")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    wait_briefly()
    typer.run(bench_command)
