"""MoBA inside transformers: tiny random models of each family, in one pass, through each cache, and generating."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import DynamicCache, StaticCache

import moba_megatron.hf as hf
from snapshot.texts import describe, write_lines

# The tests of this folder import its helpers by their bare names.
sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))
from hf_examples import MODELS, build, padded, tokens  # noqa: E402

CACHES = {
    "moba": lambda model: hf.MoBACache(),
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=70),
}
PIECES = (0, 10, 11, 12, 13, 20, 21, 45)


def take_huggingface(out: Path) -> None:
    """Logits and generated tokens."""
    torch.set_num_threads(1)
    write_lines(out, "huggingface/logits.txt", _logits())
    write_lines(out, "huggingface/generated.txt", _generated())


@torch.no_grad()
def _logits() -> Iterator[str]:
    for family in MODELS:
        for decode in ("moba", "full"):
            model, ids = build(family, decode=decode), tokens(45)
            yield f"{family} {decode} one pass: {describe(model(ids, use_cache=False).logits)}"
            rows, mask = padded([tokens(30, seed=1), tokens(13, seed=2)], "left")
            yield f"{family} {decode} padded: {describe(model(rows, attention_mask=mask, use_cache=False).logits)}"
            for name, make in CACHES.items():
                cache, parts = make(model), []
                for start, end in zip(PIECES, PIECES[1:], strict=False):
                    positions = torch.arange(start, end)
                    found = model(
                        ids[:, start:end],
                        attention_mask=torch.ones(1, end, dtype=torch.int64),
                        position_ids=positions[None],
                        cache_position=positions,
                        past_key_values=cache,
                        use_cache=True,
                    )
                    parts.append(found.logits)
                yield f"{family} {decode} {name} cache: {describe(torch.cat(parts, dim=1))}"
    model = build().float()
    yield f"fp32: {describe(model(tokens(45), use_cache=False).logits)}"
    yield f"bf16: {describe(model.bfloat16()(tokens(45), use_cache=False).logits)}"


@torch.no_grad()
def _generated() -> Iterator[str]:
    for decode in ("moba", "full"):
        for name, make in CACHES.items():
            model, ids = build(decode=decode), tokens(30)
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=20,
                past_key_values=make(model),
            )
            yield f"{decode} {name}: {' '.join(map(str, found[0, 30:].tolist()))}"
