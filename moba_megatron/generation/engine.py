"""Continuing a prompt through a key/value cache: prefill in pieces, then one token at a time.

In decode mode `moba` the tokens are those of a model that passes over the whole text for each; a step reads the chosen
blocks only. In decode mode `full` the prompt goes under MoBA and each new token attends to everything before it (MoBA
report); the first new token comes from the prefill and is the same in both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from moba_megatron.generation.sampling import check_sampling, next_token
from moba_megatron.hf import MoBACache, prefill


@torch.no_grad()
def continue_prompt(
    model: Any,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    prefill_tokens: int = 4096,
) -> Iterator[int]:
    """Yield new token ids as they are chosen.

    Args:
        model: a causal language model of transformers in evaluation mode.
        prompt: token ids, at least one.
        stop_ids: end early after one of these, which is not yielded.
        prefill_tokens: tokens of the prompt taken at a time, at least 3; bounds the memory of activations.

    Raises:
        ValueError: empty prompt, or settings out of range.
    """
    check_sampling(prompt, temperature, top_p)
    generator = torch.Generator(model.device).manual_seed(seed)
    cache = MoBACache(room=len(prompt) + max_new_tokens)
    ids = torch.tensor([prompt], device=model.device)
    prefill(model, ids, cache, piece=prefill_tokens)
    step = ids[:, cache.get_seq_length() :]
    for _ in range(max_new_tokens):
        logits_V = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        token = next_token(logits_V, temperature=temperature, top_p=top_p, generator=generator)
        if token in stop_ids:
            return
        yield token
        step = torch.tensor([[token]], device=model.device)
