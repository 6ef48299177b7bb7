"""A long prompt in pieces: memory for the activations of one piece at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


@torch.no_grad()
def prefill(model: Any, input_ids: Tensor, cache: Cache, *, piece: int, attention_mask: Tensor | None = None) -> Cache:
    """Fill a cache with a prompt, but for its end, which the first step of `generate` takes.

    Each piece attends by MoBA to the cache and to itself, so the final cache equals that of a single pass over the
    prompt. At least two tokens remain: a single token with a past would count as decoding, which in decode mode `full`
    is another attention than the prompt's.

    Args:
        model: a causal language model.
        input_ids: int64 [batch, tokens], padded on the left if at all.
        cache: empty, or filled with the beginning of `input_ids`.
        piece: tokens at a time, at least 3.
        attention_mask: [batch, tokens], 0 for padding.

    Returns:
        The cache, for `model.generate(input_ids, past_key_values=cache)`, with tokens left for it to start with.

    Raises:
        ValueError: pieces of less than three tokens.
    """
    if piece < 3:
        raise ValueError(f"piece must be at least 3 tokens, got {piece}")
    tokens, start = input_ids.shape[1], cache.get_seq_length()
    while tokens - start > piece:
        # What remains is never a single token.
        end = start + piece - (tokens - start - piece == 1)
        seen = None if attention_mask is None else attention_mask[:, :end]
        positions = _positions(input_ids[:, :end], seen)[:, start:]
        model(
            input_ids=input_ids[:, start:end],
            attention_mask=seen,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        start = end
    return cache


def _positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
