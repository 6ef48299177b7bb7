"""Time per new token against the length of the context, for both decode modes; prefill against full attention.

What is timed, on a random model of transformers in fp32 on the CPU:

- a step: one forward pass of one new token over a `MoBACache` filled to the length (with random keys and values: time
  does not depend on them), in decode mode `full` and in decode mode `moba`, and in decode mode `moba` over the dynamic
  cache of transformers, which copies all keys and makes all summaries at each step;
- the prefill: one forward pass over the whole prompt under MoBA, and under transformers' `sdpa`.

Modes take turns, and the smallest of several times is reported, because other work on the machine only adds. Before
anything is timed, steps of a short text are compared with one pass over it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

from moba_megatron.benchmark.report import print_table, write_csv, write_markdown
from moba_megatron.benchmark.settings import BenchSettings
from moba_megatron.hf import MoBACache, configure


@dataclass(frozen=True)
class DecodeSettings:
    """What to measure.

    Attributes:
        lengths: tokens before the new one.
        prefill_up_to: the prefill is timed up to this length.
        block_size, top_k: of MoBA, in all layers.
        layers, num_heads, num_kv_heads, head_size: of the random Llama; its width is num_heads * head_size.
        runs: timed runs of each.
        threads: CPU threads; 0 leaves the process's setting.
    """

    lengths: tuple[int, ...] = (2048, 8192, 32768, 131072)
    prefill_up_to: int = 32768
    block_size: int = 512
    top_k: int = 3
    layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    head_size: int = 64
    runs: int = 10
    threads: int = 1


def decode_settings(settings: BenchSettings) -> DecodeSettings:
    """What `moba-megatron bench --decode` measures, from the options that it shares with the operator's benchmark.

    Raises:
        ValueError: several pairs of block size and top-k, or another device than the CPU.
    """
    if len(settings.blocks) != 1:
        raise ValueError(f"--decode takes one pair of block size and top-k, got --blocks {settings.blocks}")
    if settings.device != "cpu":
        raise ValueError(f"--decode measures on the CPU alone, got --device {settings.device}")
    ((block_size, top_k),) = settings.blocks
    return DecodeSettings(
        lengths=settings.lengths,
        block_size=block_size,
        top_k=top_k,
        num_heads=settings.num_heads,
        num_kv_heads=settings.num_kv_heads,
        head_size=settings.head_size,
        runs=settings.runs,
        threads=settings.threads,
    )


@dataclass(frozen=True)
class DecodeRow:
    """Seconds at one length; None where not measured."""

    tokens: int
    step_full: float
    step_moba: float
    step_moba_dynamic_cache: float
    prefill_full: float | None
    prefill_moba: float | None


HEADINGS = tuple(field.name.replace("_", " ") for field in fields(DecodeRow))


def run_decode_bench(settings: DecodeSettings, output: Path, console: Console) -> list[DecodeRow]:
    """Measure every length, print a table, write `decode.csv` and `decode.md`.

    Raises:
        ValueError: sizes that make no model.
        RuntimeError: steps do not give what one pass gives.
    """
    rows = []
    output.mkdir(parents=True, exist_ok=True)
    for row in measure(settings):
        rows.append(row)
        console.print(f"{row.tokens:,} tokens measured")
        write_csv(output / "decode.csv", DecodeRow, rows)
    cells = [_cells(row) for row in rows]
    print_table(console, f"decoding, B = {settings.block_size}, K = {settings.top_k}", HEADINGS, cells)
    write_markdown(output / "decode.md", HEADINGS, cells)
    for suffix in ("csv", "md"):
        console.print(f"  {output / 'decode'}.{suffix}")
    return rows


@torch.no_grad()
def measure(settings: DecodeSettings) -> Iterator[DecodeRow]:
    """Measure one length after the other.

    Raises:
        ValueError: sizes that make no model.
        RuntimeError: steps do not give what one pass gives.
    """
    if settings.num_heads % settings.num_kv_heads:
        raise ValueError(f"{settings.num_heads} query heads are no multiple of {settings.num_kv_heads} key heads")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model = _random_model(settings)
    _check(model, settings)
    for length in settings.lengths:
        yield _measure_length(model, settings, length)


def _random_model(settings: DecodeSettings) -> Any:
    torch.manual_seed(0)
    width = settings.num_heads * settings.head_size
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
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
        keys, values = torch.randn(2, 1, settings.num_kv_heads, length, settings.head_size)
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


def _cells(row: DecodeRow) -> list[str]:
    steps = (row.step_full, row.step_moba, row.step_moba_dynamic_cache)
    prefills = (row.prefill_full, row.prefill_moba)
    milliseconds = (f"{seconds * 1e3:.1f} ms" for seconds in steps)
    return [f"{row.tokens:,}", *milliseconds, *("-" if s is None else f"{s:.2f} s" for s in prefills)]
