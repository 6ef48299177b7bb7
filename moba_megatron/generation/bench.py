"""Time per new token against the length of the context, for both decode modes; prefill against full attention.

`python -m moba_megatron.generation.bench` measures a random model of transformers. What is timed:

- a step: one forward pass of one new token over a `MoBACache` filled to the length (with random keys and values: time
  does not depend on them), in decode mode `full` and in decode mode `moba`, and in decode mode `moba` over the dynamic
  cache of transformers, which copies all keys and makes all summaries at each step;
- the prefill: one forward pass over the whole prompt under MoBA, and under transformers' `sdpa`.

Modes take turns, and the smallest of several times is reported, because other work on the machine only adds. Before
anything is timed, steps of a short text are held against one pass over it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

from moba_megatron.hf import MoBACache, configure


@dataclass(frozen=True)
class DecodeSettings:
    """What to measure.

    Attributes:
        lengths: tokens before the new one.
        prefill_up_to: the prefill is timed up to this length.
        block_size, top_k: of MoBA, in all layers.
        layers, heads, groups, head_size: of the random Llama; its width is heads * head_size.
        runs: timed runs of each.
        threads: CPU threads.
    """

    lengths: tuple[int, ...] = (2048, 8192, 32768, 131072)
    prefill_up_to: int = 32768
    block_size: int = 512
    top_k: int = 3
    layers: int = 4
    heads: int = 8
    groups: int = 2
    head_size: int = 64
    runs: int = 10
    threads: int = 1


@dataclass(frozen=True)
class DecodeRow:
    """Seconds at one length; None where not measured."""

    tokens: int
    step_full: float
    step_moba: float
    step_moba_dynamic_cache: float
    prefill_full: float | None
    prefill_moba: float | None


@torch.no_grad()
def measure(settings: DecodeSettings) -> list[DecodeRow]:
    """Measure every length, in fp32 on the CPU.

    Raises:
        RuntimeError: steps do not give what one pass gives.
    """
    torch.set_num_threads(settings.threads)
    model = _random_model(settings)
    _check(model, settings)
    return [_measure_length(model, settings, length) for length in settings.lengths]


def _random_model(settings: DecodeSettings) -> Any:
    torch.manual_seed(0)
    width = settings.heads * settings.head_size
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.groups,
        head_dim=settings.head_size,
        max_position_embeddings=2 * max(settings.lengths),
    )
    model = LlamaForCausalLM(config).eval()
    _set_decode(model, settings, "moba")
    return model


def _set_decode(model: Any, settings: DecodeSettings, decode: str) -> None:
    configure(model, block_size=settings.block_size, top_k=settings.top_k, decode=decode)


def _check(model: Any, settings: DecodeSettings) -> None:
    length = settings.block_size * (settings.top_k + 1) + 3
    ids = torch.randint(0, 512, (1, length))
    cache = MoBACache()
    model(ids[:, :-3], past_key_values=cache, logits_to_keep=1)
    steps = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(length - 3, length)]
    difference = float((torch.cat(steps, dim=1) - model(ids, logits_to_keep=3).logits).abs().max())
    if difference > 1e-4:
        raise RuntimeError(f"steps differ from one pass over {length} tokens by {difference}: no speed is reported")


def _measure_length(model: Any, settings: DecodeSettings, length: int) -> DecodeRow:
    caches = {"full": MoBACache(length + 64), "moba": MoBACache(length + 64), "dynamic": DynamicCache()}
    for cache in caches.values():
        _fill(cache, settings, length)
    token = torch.zeros(1, 1, dtype=torch.int64)

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            _set_decode(model, settings, "full" if name == "full" else "moba")
            begin = time.perf_counter()
            model(token, past_key_values=caches[name])
            times[name].append(time.perf_counter() - begin)

        return run

    times: dict[str, list[float]] = {name: [] for name in caches}
    # The first run makes the summaries and is not counted.
    for _ in range(settings.runs + 1):
        for name in caches:
            step(name)()
    steps = {name: min(seconds[1:]) for name, seconds in times.items()}
    prefill = (None, None)
    if length <= settings.prefill_up_to:
        prefill = tuple(_time_prefill(model, name, length) for name in ("sdpa", "moba"))
    return DecodeRow(length, steps["full"], steps["moba"], steps["dynamic"], *prefill)


def _fill(cache: Cache, settings: DecodeSettings, length: int) -> None:
    for layer in range(settings.layers):
        keys, values = torch.randn(2, 1, settings.groups, length, settings.head_size)
        cache.update(keys, values, layer)


def _time_prefill(model: Any, attention: str, length: int) -> float:
    ids = torch.randint(0, 512, (1, length))
    model.set_attn_implementation(attention)
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        model(ids, use_cache=False, logits_to_keep=1)
        times.append(time.perf_counter() - begin)
    model.set_attn_implementation("moba")
    return min(times)


def table(rows: list[DecodeRow]) -> str:
    """Markdown: milliseconds a step and seconds a prefill."""

    def cell(name: str, value: float | None) -> str:
        if value is None:
            return "-"
        return str(value) if name == "tokens" else f"{value * 1e3:.1f} ms" if "step" in name else f"{value:.2f} s"

    names = [field.name for field in fields(DecodeRow)]
    lines = [[name.replace("_", " ") for name in names], ["---"] * len(names)]
    lines += [[cell(name, getattr(row, name)) for name in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(
    lengths: Annotated[str, typer.Option(help="Tokens before the new one, by commas.")] = "2048,8192,32768,131072",
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per block.")] = 512,
    top_k: Annotated[int, typer.Option(min=1, help="Blocks per query, its own counted.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    output: Annotated[Path | None, typer.Option(help="File for the table, beside standard output.")] = None,
) -> None:
    """Measure decoding and prefill on this CPU."""
    chosen = tuple(int(length) for length in lengths.split(","))
    text = table(measure(DecodeSettings(lengths=chosen, block_size=block_size, top_k=top_k, threads=threads)))
    typer.echo(text)
    if output is not None:
        output.write_text(text)


if __name__ == "__main__":
    typer.run(main)
