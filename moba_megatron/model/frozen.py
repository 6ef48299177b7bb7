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

    An index learns from its own loss, whose gradient stays in the layer. So the others have no backward pass: what
    attention and feed-forward read is cut off from the hidden states, which carry gradients of zero along the residual
    stream alone. Products keep nothing for it, but for the attention's output projection, to whose input the loss of
    the index is attached; recomputation of norms is off.

    The output of the embedding wants gradients all the same. Without, a layer that is computed again would have no
    input that wants one, and the index in it would get none.

    Args:
        parts: `router` for the indexes that choose blocks.
    """
    belongs = {"router": is_of_index}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(any(belongs[part](name) for part in parts))
        chunk.loss_teaches = False
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(_wants_gradient)
        for layer in chunk.decoder.layers:
            layer.recompute_input_layernorm = layer.recompute_pre_mlp_layernorm = False
            for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
                norm.register_forward_hook(_cut_off)


def _wants_gradient(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def _cut_off(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.detach()
