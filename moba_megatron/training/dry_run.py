"""`train.py --dry-run`: what would run, without data, processes or weights."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from moba_megatron.config import Config, ConfigError, check_world
from moba_megatron.data.tokenizer import Tokenizer
from moba_megatron.model.builder import count_parameters
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.planning.flops import attended_pairs, training_flops_per_token
from moba_megatron.planning.memory import estimate_memory
from moba_megatron.training.preflight import checked_schedule, run_choices


def print_dry_run(config: Config, world_size: int) -> None:
    """Print the resolved configuration, sizes, the attention schedule and the estimated memory of a rank.

    Without a launcher (`world_size` 1) the smallest number of processes that the parallel sizes allow is assumed.
    """
    parallel = config.parallel
    world_size = max(world_size, parallel.tensor * parallel.pipeline * parallel.context)
    data_parallel = check_world(config, world_size)
    vocab_size = config.model.vocab_size or _tokenizer_size(config)
    schedule = checked_schedule(config)
    choices = run_choices(config, schedule)
    counts = count_parameters(config, vocab_size)
    console = Console(highlight=False, soft_wrap=True)
    console.print(config.to_yaml(), markup=False)
    console.print(f"processes            {world_size} ({data_parallel} data-parallel)")
    console.print(f"parameters           {counts.total:,} ({counts.layers:,} without embeddings)")
    console.print(f"tokens per step      {config.tokens_per_step:,}")
    console.print(f"tokens in all        {config.tokens_per_step * config.training.steps:,}")
    console.print("\n".join([*choices, schedule.table(config.training.steps)]), markup=False)
    _print_flops(console, config, schedule, vocab_size)
    _print_memory(console, config, counts.total, vocab_size, data_parallel)


def _tokenizer_size(config: Config) -> int:
    try:
        return Tokenizer(config.data.tokenizer).vocab_size
    except (OSError, ValueError) as error:
        raise ConfigError([f"model.vocab_size is not set and data.tokenizer cannot be read: {error}"]) from error


def _print_flops(console: Console, config: Config, schedule: AttentionSchedule, vocab_size: int) -> None:
    full = attended_pairs(config.data.sequence_length)
    for number, stage in enumerate(schedule.stages, start=1):
        layers = [None if a.kind == "full" else (a.block_size, a.top_k) for a in stage]
        flops = training_flops_per_token(config, vocab_size, layers)
        pairs = sum(attended_pairs(config.data.sequence_length, *(layer or ())) for layer in layers) / len(layers)
        console.print(
            f"stage {number}: {flops:.3e} training FLOPs a token, {pairs / full:.1%} of the pairs of full attention"
        )


def _print_memory(console: Console, config: Config, parameters: int, vocab_size: int, data_parallel: int) -> None:
    memory = estimate_memory(config, parameters, vocab_size, data_parallel)
    table = Table("memory per rank (estimate)", "GiB")
    for name in ("weights", "gradients", "optimizer", "activations", "loss", "total"):
        table.add_row(name, f"{getattr(memory, name) / 2**30:.3f}")
    console.print(table)
