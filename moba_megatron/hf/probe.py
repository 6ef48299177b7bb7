"""Check that a model really uses the attention registered as "moba": tests the model, not its configuration."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from moba_megatron.hf.attention import moba_attention_forward
from moba_megatron.hf.settings import NAME, MoBASettings


def has_moba_layers(model: Any) -> bool:
    """Whether any layer of a transformers model attends by MoBA, as it is set now."""
    return model.config._attn_implementation == NAME and MoBASettings.from_config(model.config).covered is not None


@torch.no_grad()
def check_attends(model: Any) -> None:
    """Check that a model attends as it says: pass one token through it; every layer must call MoBA's attention.

    A model class that does not take its attention from transformers' interface would otherwise attend fully without a
    word.

    Args:
        model: a causal language model in evaluation mode, loaded with `attn_implementation="moba"`.

    Raises:
        ValueError: layers that attend by something else, by number.
    """
    reached: set[int] = set()

    def noting(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        reached.add(module.layer_idx)
        return moba_attention_forward(module, *args, **kwargs)

    AttentionInterface.register(NAME, noting)
    try:
        model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        AttentionInterface.register(NAME, moba_attention_forward)
    missed = sorted(set(range(model.config.get_text_config().num_hidden_layers)) - reached)
    if missed:
        raise ValueError(
            f"layers {missed} (counted from 0) of {type(model).__name__} do not attend by MoBA, although the model "
            f"was loaded with it: its class does not use transformers' attention interface"
        )
