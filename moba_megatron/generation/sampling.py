"""The choice of a token from logits, and the settings of that choice."""

from __future__ import annotations

import torch


def next_token(logits_V: torch.Tensor, *, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """Choose a token from logits: the best one at temperature 0, else sampled from the smallest set of tokens with at
    least `top_p` of the probability (nucleus sampling, arXiv 1904.09751)."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities, order = torch.softmax(logits_V.float() / temperature, dim=-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def check_sampling(prompt: list[int], temperature: float, top_p: float) -> None:
    """Check a prompt and how it shall be continued. Raises ValueError."""
    if not prompt:
        raise ValueError("the prompt has no token: give at least one")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature = {temperature} must be at least 0, and top_p = {top_p} within (0, 1]")
