"""Combinations of settings of a training that cannot work: steps, rates, recomputation, divergence, evaluation."""

from __future__ import annotations

from moba_megatron.config.schema import Config
from moba_megatron.config.words import nearest_multiples


def training_checks(config: Config) -> list[tuple[bool, str]]:
    """(wrong, what to say) for each combination."""
    training, optimizer, length = config.training, config.optimizer, config.data.sequence_length
    wsd, profile = optimizer.wsd_decay_steps, config.logging.profile_steps
    trailing = config.evaluation.trailing_tokens
    return [
        (
            training.global_batch_size % training.micro_batch_size != 0,
            f"training.global_batch_size = {training.global_batch_size} is not a multiple of "
            f"training.micro_batch_size = {training.micro_batch_size}: "
            f"use {nearest_multiples(training.global_batch_size, training.micro_batch_size)}",
        ),
        (
            optimizer.warmup_steps >= training.steps,
            f"optimizer.warmup_steps = {optimizer.warmup_steps} must be below training.steps = {training.steps}",
        ),
        (
            optimizer.min_lr > optimizer.lr,
            f"optimizer.min_lr = {optimizer.min_lr} is over optimizer.lr = {optimizer.lr}",
        ),
        (
            (optimizer.decay == "WSD") != (wsd is not None),
            f"optimizer.wsd_decay_steps = {wsd}: it belongs to optimizer.decay: WSD, and must be set there",
        ),
        (
            wsd is not None and wsd > training.steps - optimizer.warmup_steps,
            f"optimizer.wsd_decay_steps = {wsd} is over the {training.steps - optimizer.warmup_steps} steps after "
            "warm-up",
        ),
        (
            training.stop_after is not None and training.stop_after > training.steps,
            f"training.stop_after = {training.stop_after} is over training.steps = {training.steps}",
        ),
        *_train_only_checks(training.train_only),
        *_recompute_checks(config),
        *_memory_checks(config),
        *_offload_checks(config),
        *_divergence_checks(config),
        (
            trailing is not None and trailing > length,
            f"evaluation.trailing_tokens = {trailing} is over data.sequence_length = {length}",
        ),
        (
            config.evaluation.position_buckets > length,
            f"evaluation.position_buckets = {config.evaluation.position_buckets} is over data.sequence_length = "
            f"{length}",
        ),
        (
            config.evaluation.every is not None and config.data.validation is None,
            f"evaluation.every = {config.evaluation.every} needs data.validation",
        ),
        (
            bool(profile) and (len(profile) != 2 or not 1 <= profile[0] <= profile[1] <= training.steps),
            f"logging.profile_steps = {profile}: give the first and the last step, within 1 to {training.steps}",
        ),
    ]


def _train_only_checks(parts: list[str] | None) -> list[tuple[bool, str]]:
    if parts is None:
        return []
    key = f"training.train_only = {parts}"
    return [
        (not parts, f"{key}: nothing learns; name a part such as router, or take it out"),
        (len(set(parts)) < len(parts), f"{key} names one twice"),
    ]


def _recompute_checks(config: Config) -> list[tuple[bool, str]]:
    model, modules = config.model, config.training.recompute
    if isinstance(modules, str):
        return []
    key = f"training.recompute = {modules}"
    return [
        (not modules, f"{key} repeats nothing: name parts of a layer, or set none"),
        (len(set(modules)) < len(modules), f"{key} names one twice"),
        ("mlp" in modules and all(model.expert_layers), f"{key}: no layer is a dense one (mlp): use moe"),
        ("moe" in modules and not any(model.expert_layers), f"{key}: no layer has experts (moe): use mlp"),
        (
            "shared_experts" in modules and model.moe_shared_expert_intermediate_size is None,
            f"{key}: there are no shared_experts without model.moe_shared_expert_intermediate_size",
        ),
        (
            {"moe", "shared_experts"} <= set(modules),
            f"{key}: moe repeats the shared experts too: take shared_experts out",
        ),
    ]


def _offload_checks(config: Config) -> list[tuple[bool, str]]:
    training, modules = config.training, config.training.offload
    key = f"training.offload = {modules}"
    of_experts = [module for module in modules if module in ("mlp_norm", "expert_fc1", "moe_act")]
    return [
        (len(set(modules)) < len(modules), f"{key} names one twice"),
        (
            "attn_proj" in modules and "core_attn" not in modules,
            f"{key}: the input of attn_proj is the output of core_attn, which that keeps too: add core_attn",
        ),
        (
            bool(of_experts) and not any(config.model.expert_layers),
            f"{key}: no layer has experts, so there is no {' and no '.join(of_experts)} to offload",
        ),
        (
            bool(modules) and training.train_only is not None,
            f"{key} has nothing to offload with training.train_only: layers that learn nothing keep nothing",
        ),
        (
            bool(modules) and training.recompute == "full",
            f"{key} has nothing to offload with training.recompute: full, which keeps the inputs of layers only",
        ),
        (
            "core_attn" in modules and training.recompute != "full" and training.repeats("core_attn"),
            f"{key}: core_attn is computed again (training.recompute = {training.recompute}), so it keeps nothing to "
            "offload: take it out of one of them",
        ),
        (
            bool(of_experts) and training.recompute != "full" and training.repeats("moe"),
            f"{key}: experts are computed again (training.recompute = {training.recompute}), so they keep nothing to "
            f"offload: take {', '.join(of_experts)} out",
        ),
    ]


def _memory_checks(config: Config) -> list[tuple[bool, str]]:
    training, layers, tokens = config.training, config.training.recompute_layers, config.training.mlp_chunk_size
    mixture = config.model.num_moe_experts is not None
    repeated = isinstance(training.recompute, list) and "mlp" in training.recompute
    half, optimizer = training.gradient_precision == "bf16", config.parallel.distributed_optimizer
    return [
        (
            layers is not None and training.recompute != "full",
            f"training.recompute_layers = {layers} belongs to training.recompute: full, not {training.recompute}",
        ),
        (
            layers is not None and layers > max(config.chunk_layers),
            f"training.recompute_layers = {layers}: no pipeline stage has over {max(config.chunk_layers)} layers in a "
            "row; leave it out to compute all again",
        ),
        (
            tokens is not None and mixture,
            f"training.mlp_chunk_size = {tokens} is for dense models: experts see few tokens each; use "
            "training.recompute: [moe]",
        ),
        (
            tokens is not None and repeated,
            f"training.mlp_chunk_size = {tokens} computes the feed-forward again already: take mlp out of "
            f"training.recompute = {training.recompute}",
        ),
        (
            half and training.precision != "bf16",
            f"training.gradient_precision = bf16 needs training.precision = bf16, not {training.precision}",
        ),
        (
            half and not optimizer,
            "training.gradient_precision = bf16 needs parallel.distributed_optimizer = true, which sums ranks in fp32",
        ),
    ]


def _divergence_checks(config: Config) -> list[tuple[bool, str]]:
    training = config.training
    late = [step for step in training.skip_batches if step > training.steps]
    return [
        (
            training.on_divergence == "rollback" and config.checkpoint.every is None,
            "training.on_divergence = rollback needs checkpoint.every: otherwise there is no checkpoint to go back to",
        ),
        (
            training.on_spike == "as_divergence" and training.spike_threshold is None,
            "training.on_spike = as_divergence has no effect without training.spike_threshold: give a number",
        ),
        (bool(late), f"training.skip_batches names steps {late}: training.steps = {training.steps}"),
        (
            training.replay is not None and training.replay > training.steps,
            f"training.replay = {training.replay} is over training.steps = {training.steps}",
        ),
    ]
