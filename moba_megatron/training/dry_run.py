"""`train.py --dry-run`: the model and layout of a run, without processes or weights; of data that is here, its
packing."""

from __future__ import annotations

from rich.console import Console

from moba_megatron.checkpoint import CheckpointError
from moba_megatron.config import Config, ConfigError, check_world
from moba_megatron.config.sizes import idle_parameters
from moba_megatron.convert.initial import describe_weights
from moba_megatron.data.packing_report import expected_packing_lines
from moba_megatron.model.builder import count_parameters
from moba_megatron.model.schedule import AttentionSchedule, checked_schedule
from moba_megatron.planning.flops import attended_pairs, training_flops_per_token
from moba_megatron.planning.memory import estimate_memory, fullest
from moba_megatron.planning.plan_machines import GPUS, Cluster
from moba_megatron.planning.plan_report import memory_table
from moba_megatron.planning.plan_stages import whole_model
from moba_megatron.planning.run_plan import plan_run, vocabulary_size
from moba_megatron.training.preflight import run_choices
from moba_megatron.training.resume import chosen_checkpoint


def print_dry_run(config: Config, world_size: int) -> None:
    """Print the resolved configuration, sizes, the attention schedule, and estimates of the memory of a rank
    and of GPU hours.

    Without a launcher (`world_size` 1) the smallest number of processes that the parallel sizes allow is assumed; the
    variable WORLD_SIZE, which launchers set, stands for any other.
    """
    world_size = max(world_size, config.parallel.fewest_ranks)
    data_parallel = check_world(config, world_size)
    vocab_size = vocabulary_size(config)
    schedule = checked_schedule(config)
    choices = [*run_choices(config, schedule), *expected_packing_lines(config)]
    counts = count_parameters(config, vocab_size)
    console = Console(highlight=False, soft_wrap=True)
    console.print(config.to_yaml(), markup=False)
    console.print(f"processes            {world_size} ({data_parallel} data-parallel)")
    console.print(f"parameters           {counts.total:,} ({counts.layers:,} without embeddings)")
    idle = idle_parameters(config.model)
    if idle:
        console.print(f"active for a token   {counts.total - idle:,} ({counts.layers - idle:,} without embeddings)")
    whole = whole_model(config, vocab_size)
    if whole.trained < whole.parameters:
        console.print(f"learning             {whole.trained:,}, the rest is frozen")
    console.print(f"tokens per step      {config.tokens_per_step:,}")
    console.print(f"tokens in all        {config.tokens_per_step * config.training.steps:,}")
    console.print("\n".join([_weights(config), *choices, schedule.table(config.training.steps)]), markup=False)
    _print_flops(console, config, schedule, vocab_size)
    _print_memory(console, config, schedule, vocab_size, data_parallel)
    _print_hours(console, config, schedule, vocab_size, world_size)


def _weights(config: Config) -> str:
    """Where the weights would come from, or why a start would not find them."""
    try:
        return describe_weights(config, chosen_checkpoint(config))
    except (CheckpointError, ConfigError) as error:
        return f"weights: {'; '.join(getattr(error, 'problems', [str(error)]))}"


def _print_flops(console: Console, config: Config, schedule: AttentionSchedule, vocab_size: int) -> None:
    full = attended_pairs(config.data.sequence_length)
    for number, stage in enumerate(schedule.stages, start=1):
        layers = [a.sizes for a in stage]
        flops = training_flops_per_token(config, vocab_size, layers)
        pairs = float(
            sum(attended_pairs(config.data.sequence_length, *(layer or ())) for layer in layers) / len(layers)
        )
        console.print(
            f"stage {number}: {flops:.3e} training FLOPs a token, {pairs / full:.1%} of the pairs of full attention"
        )


def _print_memory(
    console: Console, config: Config, schedule: AttentionSchedule, vocab_size: int, data_parallel: int
) -> None:
    """The fullest rank on both kinds of machine: their kernels keep different tensors."""
    columns = {
        f"{words}, GiB": fullest(estimate_memory(config, schedule, vocab_size, data_parallel, device_type))
        for words, device_type in (("GPU", "cuda"), ("CPU", "cpu"))
    }
    console.print(memory_table(columns, "memory per rank (estimate)"))


def _print_hours(
    console: Console, config: Config, schedule: AttentionSchedule, vocab_size: int, world_size: int
) -> None:
    """GPU hours of the whole run on each kind of GPU, where there is a model of its times."""
    if config.training.precision != "bf16":
        return
    fitting = True
    for gpu in GPUS.values():
        plan = plan_run(config, schedule, vocab_size, Cluster(gpu, world_size))
        fits = "" if plan.fits else f"; does not fit its {gpu.memory / 1e9:.0f} GB"
        fitting &= plan.fits
        console.print(
            f"{world_size} x {gpu.name} (estimate): {plan.tokens_per_second:,.0f} tokens/s, {plan.hours:,.1f} hours, "
            f"{plan.gpu_hours:,.1f} GPU hours{fits}"
        )
    if not fitting and config.parallel.distributed_optimizer:
        console.print("optimizer state is spread over all GPUs: for another number of them set WORLD_SIZE=N")
    console.print("moba-megatron plan CONFIG --gpus N shows the time of each part, and suggests layouts")
