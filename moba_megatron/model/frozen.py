"""Training of some weights alone: `training.train_only`, and an index without a loss."""

from __future__ import annotations

import torch

from moba_megatron.config import Config
from moba_megatron.model.block_router import block_routers, is_of_index


def freeze(chunks: list[torch.nn.Module], config: Config) -> None:
    """Freeze what a configuration lets learn nothing; before data parallelism wraps the chunks. Frozen weights have
    neither gradients nor a state of the optimizer."""
    if config.training.train_only is not None:
        train_only(chunks, config.training.train_only)
    if config.attention.router_loss == "none":
        for router in block_routers(chunks):
            router.requires_grad_(False)


def train_only(chunks: list[torch.nn.Module], parts: list[str]) -> None:
    """Let only the named parts of model chunks learn.

    The output of the embedding wants gradients all the same. Without, a layer that is computed again would have no
    input that wants one, and the index in it would get none.

    Args:
        parts: `router` for the indexes that choose blocks.
    """
    belongs = {"router": is_of_index}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(any(belongs[part](name) for part in parts))
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(_wants_gradient)


def _wants_gradient(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output
