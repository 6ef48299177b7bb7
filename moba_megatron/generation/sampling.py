"""Generation by the definition: each new token comes from one forward pass over the whole text so far.

Nothing is cached, so this is exact for any attention schedule (decoding with MoBA equals one pass over the whole text)
and slow: quadratic in the length. It is the truth that decoding through a cache (`engine`) is held against.
"""

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


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompt: list[int],
    *,
    max_new_tokens: int,
    vocab_size: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    stop_id: int | None = None,
) -> list[int]:
    """Continue a prompt.

    Args:
        model: a whole GPT model (one pipeline stage, tensor-parallel size 1) in evaluation mode.
        prompt: token ids, at least one.
        vocab_size: ids from here on are padding and never chosen.
        stop_id: end early after this id, which is not returned.

    Returns:
        The new token ids.

    Raises:
        ValueError: empty prompt, or a temperature or top_p out of range.
    """
    check_sampling(prompt, temperature, top_p)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    text = list(prompt)
    for _ in range(max_new_tokens):
        tokens = torch.tensor([text], device=device)
        positions = torch.arange(len(text), device=device).unsqueeze(0)
        logits_V = model(tokens, positions, attention_mask=None)[0, -1, :vocab_size]
        token = next_token(logits_V, temperature=temperature, top_p=top_p, generator=generator)
        if token == stop_id:
            break
        text.append(token)
    return text[len(prompt) :]
