"""Every check that needs no process group, and every choice that `auto` leaves, made once before a run starts."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from moba_megatron.checkpoint import Manifest
from moba_megatron.config import Config, ConfigError, check_world
from moba_megatron.config.router import index_learns
from moba_megatron.convert.initial import check_initial_weights, describe_weights, require_source
from moba_megatron.data.datasets import DataSummary, check_data
from moba_megatron.data.index_cache import index_lines
from moba_megatron.model.builder import DTYPES
from moba_megatron.model.exchange_choice import resolve_exchange
from moba_megatron.model.schedule import AttentionSchedule, checked_schedule
from moba_megatron.model.specs import choose_implementation, has_fused_attention
from moba_megatron.ops.backends import resolve_backend, resolve_full_backend
from moba_megatron.ops.dense import KERNELS, takes_groups
from moba_megatron.planning.attention_advice import advice_here
from moba_megatron.platform import current_device, optional_libraries
from moba_megatron.runs.trackers import check_trackers
from moba_megatron.training.data_position import DataPosition, resumed_position
from moba_megatron.training.replay_start import replay_checkpoint
from moba_megatron.training.resume import chosen_checkpoint, find_resume


@dataclass(frozen=True)
class Preflight:
    """The results of the checks before any process group starts."""

    world_size: int
    data_parallel: int
    schedule: AttentionSchedule
    data: DataSummary
    vocab_size: int
    resume: Path | None
    position: DataPosition
    weights: str
    """Where the weights come from, in one line."""
    choices: list[str]
    """Every choice of `auto`, and the reason: one line each."""


def preflight(config: Config, world_size: int) -> Preflight:
    """Check everything that can be checked by one process.

    Raises:
        ConfigError: sizes that do not fit the processes, data or checkpoint that cannot be used, a missing library.
    """
    require_source(config)
    data_parallel = check_world(config, world_size)
    schedule = checked_schedule(config)
    try:
        check_trackers(config.logging)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    data = check_data(config)
    if config.training.replay is None:
        resume = find_resume(config, schedule, data.identity)
    else:
        resume = replay_checkpoint(config, schedule, data.identity)
    # A resumed run has its weights already; their source may be gone.
    initial = [] if resume else check_initial_weights(config, data.vocab_size)
    manifest = Manifest.read(resume) if resume else None
    position = resumed_position(manifest, config, data.identity) if manifest else DataPosition()
    if config.training.replay is None:
        _refuse_late_skips(config, position)
    return Preflight(
        world_size=world_size,
        data_parallel=data_parallel,
        schedule=schedule,
        data=data,
        vocab_size=config.model.vocab_size or data.vocab_size,
        resume=resume,
        position=position,
        weights=describe_weights(config, resume),
        choices=[
            *run_choices(config, schedule),
            *index_lines(config),
            *initial,
            *position.lines(),
            *_kept_no_longer(manifest, position),
        ],
    )


def preflight_again(config: Config, ready: Preflight) -> Preflight:
    """As `ready`, for the checkpoint that is there now: once a run folder is this run's alone, nobody adds another.

    Raises:
        ConfigError: as `preflight`, if that is another one than before.
    """
    return ready if chosen_checkpoint(config) == ready.resume else preflight(config, ready.world_size)


def _kept_no_longer(manifest: Manifest | None, position: DataPosition) -> list[str]:
    """A note on batches that should be left out but are not."""
    lost = [entry["step"] for entry in manifest.skipped_batches if entry not in position.skipped] if manifest else []
    return [f"the batches of steps {lost} are no longer left out: these steps now have other samples"] if lost else []


def _refuse_late_skips(config: Config, position: DataPosition) -> None:
    """A batch that was trained on cannot be left out any more."""
    done = {entry["step"] for entry in position.skipped}
    late = [step for step in config.training.skip_batches if step <= position.step and step not in done]
    if late:
        raise ConfigError([
            f"training.skip_batches names steps {late}, which the checkpoint of step {position.step} was trained on: "
            "start from a checkpoint before them in another run.dir (checkpoint.resume=PATH), or take them out"
        ])  # fmt: skip


def run_choices(config: Config, schedule: AttentionSchedule) -> list[str]:
    """The choices for a run of this configuration on this machine, one line each with its reason.

    Raises:
        ConfigError: an attention backend that cannot run here, or an exchange that cannot run with these sizes.
    """
    try:
        device = current_device()
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    try:
        backend, reason = resolve_backend(config.attention.backend, device, DTYPES[config.training.precision])
    except ValueError as error:
        raise ConfigError([f"attention.backend = {config.attention.backend}: {error}"]) from error
    full = _full_attention(config, schedule, device)
    _check_dispatcher(config, device)
    if config.training.offload and choose_implementation(device.type) != "transformer_engine":
        raise ConfigError([
            f"training.offload = {config.training.offload} needs a GPU and transformer-engine, whose layers move "
            "activations to the host: leave it out, or use training.recompute"
        ])  # fmt: skip
    libraries = optional_libraries()
    fused_adam = [
        name for name in ("transformer_engine", "apex") if device.type == "cuda" and libraries[name].available
    ]
    lines = [
        f"attention.backend = {config.attention.backend}: {backend} ({reason})",
        f"attention.full_backend = {config.attention.full_backend}: {full}",
        f"layers: {choose_implementation(device.type)}; Adam: {fused_adam[0] if fused_adam else 'PyTorch'}",
        *resolve_exchange(config).lines,
        *_expert_lines(config),
    ]
    length = config.data.sequence_length
    covered = sum(
        layer.kind == "moba" and layer.block_size * layer.fewest_blocks >= length and layer.selection.fills_up
        for layers in schedule.stages
        for layer in layers
    )
    if covered:
        learns = config.attention.router == "index" and config.attention.router_loss == "sparse"
        lines.append(
            f"attention: in {covered} layers (over all stages) top_k blocks cover data.sequence_length = {length}: "
            + (
                "MoBA's kernels attend to all of them, and the index learns"
                if learns
                else "MoBA is full attention there"
            )
        )
    if config.attention.router == "index" and config.attention.router_loss != "none":
        lines += _index_lines(config, schedule)
    if backend == "triton" and device.type == "cuda":
        lines += advice_here(config, schedule, torch.cuda.get_device_name(device), torch.cuda.device_count())
    return lines


def _index_lines(config: Config, schedule: AttentionSchedule) -> list[str]:
    """A note on indexes that never learn, beside others that do."""
    idle = [
        number
        for number, stages in enumerate(zip(*schedule.stages, strict=True), start=1)
        if not schedule.always_full(number)
        and not any(layer.kind == "moba" and index_learns(config, layer.block_size, layer.top_k) for layer in stages)
    ]
    if not idle:
        return []
    return [
        f"attention.router_loss = {config.attention.router_loss}: the index of layer {', '.join(map(str, idle))} stays "
        "as it is: no query there has two past blocks to compare"
    ]


def _check_dispatcher(config: Config, device: torch.device) -> None:
    """Raise ConfigError if this machine cannot use the configured dispatcher of tokens to experts."""
    parallel = config.parallel
    if config.model.num_moe_experts is None:
        return
    if parallel.expert_dispatcher == "flex" and (device.type != "cuda" or importlib.util.find_spec("deep_ep") is None):
        lacks = "this machine has no GPU" if device.type != "cuda" else "deep_ep is not installed"
        raise ConfigError([f"parallel.expert_dispatcher = flex: {lacks}; use alltoall"])
    if parallel.expert_dispatcher == "alltoall" and parallel.expert_tensor > 1 and device.type == "cpu":
        raise ConfigError([
            f"parallel.expert_tensor = {parallel.expert_tensor} with parallel.expert_dispatcher = alltoall: the CPU's "
            "collectives (gloo) cannot gather unequal numbers of tokens; use expert_tensor 1, or allgather"
        ])  # fmt: skip


def _expert_lines(config: Config) -> list[str]:
    """A mixture of experts and its load balancing, as text."""
    model, parallel = config.model, config.parallel
    if model.num_moe_experts is None:
        return []
    balance = []
    if model.moe_router_load_balancing_type == "sinkhorn":
        balance.append("sinkhorn")
    elif model.moe_aux_loss_coeff:
        balance.append(f"{model.moe_router_load_balancing_type} of weight {model.moe_aux_loss_coeff}")
    if model.moe_router_enable_expert_bias:
        balance.append("a bias of each expert")
    kept = " and ".join(balance) or "nothing (model.moe_aux_loss_coeff = 0)"
    return [
        f"experts: {model.moe_router_topk} of {model.num_moe_experts} for each token in {sum(model.expert_layers)} of "
        f"{model.num_layers} layers, {model.num_moe_experts // parallel.expert} on a rank, "
        f"parallel.expert_dispatcher = {parallel.expert_dispatcher}; their load is balanced by {kept}"
    ]


def _full_attention(config: Config, schedule: AttentionSchedule, device: torch.device) -> str:
    """The implementation of full attention, with the reason.

    Raises:
        ConfigError: a backend asked for by name that cannot run here, or not with these settings.
    """
    wanted = config.attention.full_backend
    if config.parallel.context > 1:
        if wanted != "auto":
            raise ConfigError([
                f"attention.full_backend = {wanted} with parallel.context = {config.parallel.context}: there full "
                f"layers use the exchanges; use auto"
            ])  # fmt: skip
        return "the exchange (context parallelism)"
    model, dtype = config.model, DTYPES[config.training.precision]
    try:
        name, reason = resolve_full_backend(wanted, device, dtype, model.head_size)
    except ValueError as error:
        raise ConfigError([f"attention.full_backend = {wanted}: {error}"]) from error
    if name in KERNELS and model.query_groups != model.num_attention_heads and not takes_groups(device, dtype):
        reason += f"; keys are repeated for each query head, because no fused kernel takes groups in {dtype}"
    layers = range(1, schedule.num_layers + 1)
    stock = choose_implementation(device.type) == "transformer_engine" and has_fused_attention(dtype)
    if stock and any(map(schedule.always_full, layers)):
        return f"{name} ({reason}); layers that are always full keep Transformer Engine's"
    return f"{name} ({reason})"
