"""megatron-core's data-parallel wrapper, optimizer and learning-rate schedule, built from the configuration."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from moba_megatron.config import Config


def wrap_data_parallel(model: list[torch.nn.Module], config: Config) -> list[DistributedDataParallel]:
    """Wrap this rank's model chunks for data parallelism, with gradients accumulated and reduced in fp32.

    The gathering of parameters is not overlapped with computation: it would leave stale ones for saving and evaluation.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
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
    """AdamW in fp32 over the wrapped chunks; norms and biases are not decayed."""
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
    built = get_megatron_optimizer(settings, model, config_overrides=get_standard_config_overrides(settings))
    transformer.grad_scale_func = built.scale_loss
    return built


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
