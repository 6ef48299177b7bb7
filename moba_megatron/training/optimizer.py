"""megatron-core's data-parallel wrapper, optimizer and learning-rate schedule, built from the configuration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from moba_megatron.config import Config
from moba_megatron.model.block_router import NAME as INDEX
from moba_megatron.model.frozen import freeze
from moba_megatron.platform import current_device


def wrap_data_parallel(model: list[torch.nn.Module], config: Config) -> list[DistributedDataParallel]:
    """Wrap this rank's model chunks for data parallelism. Ranks are summed in fp32, also gradients that are accumulated
    in bf16.

    The gathering of parameters is not overlapped with computation: it would leave stale ones for saving and evaluation.
    Weights that are to learn nothing are frozen.
    """
    freeze(model, config)
    half = config.training.gradient_precision == "bf16"
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not half,
        reduce_scatter_with_fp32_accumulation=half,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    transformer = model[0].config
    wrapped = [
        DistributedDataParallel(transformer, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model)
    ]
    transformer.finalize_model_grads_func = finalize_model_grads
    # Gradients leave after the last microbatch of a step alone.
    transformer.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def build_optimizer(model: list[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """AdamW in fp32 over the wrapped chunks. Norms and biases are not decayed; nor are indexes, for decay would change
    them in the stages that do not use them."""
    transformer, optimizer = model[0].config, config.optimizer
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=transformer.bf16,
        params_dtype=transformer.params_dtype,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    overrides = get_standard_config_overrides(settings)
    overrides[ParamKey(name=f"*.{INDEX}.*")] = ParamGroupOverride(wd_mult=0.0)
    built = get_megatron_optimizer(settings, model, config_overrides=overrides)
    assert isinstance(built, ChainedOptimizer), "`update` looks at the gradients where this kind asks for their norm"
    transformer.grad_scale_func = built.scale_loss
    return built


class UpdateRefused(Exception):
    """An update that was not made; `grad_norm` is the norm of its gradients on this rank."""

    def __init__(self, grad_norm: float):
        self.grad_norm = grad_norm
        super().__init__(f"gradient norm {grad_norm}")


def update(optimizer: MegatronOptimizer, refuse: Callable[[float], bool]) -> float:
    """Clip the gradients and update the weights, unless a rank refuses to. Collective.

    Args:
        refuse: asked for the norm of the gradients before clipping. That is after megatron-core's `prepare_grads()` and
            before `step_with_ready_grads()`: of what outlives the step nothing has changed yet.

    Returns:
        The norm of the gradients before clipping.

    Raises:
        UpdateRefused: on every rank, if `refuse` said so on any.
    """
    norm_of = optimizer.get_grad_norm

    def looked_at() -> float:
        norm = norm_of()
        refused = torch.tensor([refuse(float(norm))], dtype=torch.int32, device=current_device())
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(refused, op=torch.distributed.ReduceOp.MAX)
        if refused.item():
            raise UpdateRefused(float(norm))
        return norm

    # `step()` of every supported release prepares the gradients, asks for their norm, clips and updates, in this order.
    optimizer.get_grad_norm = looked_at
    try:
        _, norm, _ = optimizer.step()
    finally:
        del optimizer.get_grad_norm
    return float(norm)


def build_scheduler(optimizer: MegatronOptimizer, config: Config) -> OptimizerParamScheduler:
    """The schedule counts optimizer steps: step n (from 1) uses the rate at n, so the last step ends at `min_lr`.

    A resumed run keeps the configuration's own values; that they are those of the checkpoint is checked before.
    """
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=config.training.steps,
        lr_decay_style=settings.decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=config.training.steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=settings.wsd_decay_steps,
        lr_wsd_decay_style="linear",
    )
