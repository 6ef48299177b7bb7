"""Inputs of the benchmarks by what their queries choose. How evenly choices fall on blocks decides how well work is
spread: over the programs of a kernel, and over the ranks of a ring.

| inputs | a query likes |
|---|---|
| `random` | any past block as well as any other |
| `sink` | the document's first block above all, as attention sinks make it |
| `hot` | a few blocks above all, one in 64, at least two |
| `local` | near blocks more than far ones |

All are drawn from a standard normal. The pattern is added to one or two channels of keys and queries; it is larger than
the variation of the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moba_megatron.benchmark.calls import DTYPES, random_inputs
from moba_megatron.benchmark.settings import INPUTS
from moba_megatron.ops import Router, select_blocks
from moba_megatron.parallel.ring_load import by_rank, ring_factor

# What is added to keys, and at least to queries, in the units of the noise.
_LIKED, _ASKED = 16.0, 2.0
# Tokens whose choices are counted at once.
_TOKENS_AT_ONCE = 2**16


def chosen_inputs(
    kind: str, length: int, heads: int, kv_heads: int, head_size: int, dtype: str, device: str, seed: int,
    block_size: int,
) -> list[Tensor]:  # fmt: skip
    """q [T, N, D], k and v [T, G, D] of one document.

    Args:
        kind: a name of the table above.
        block_size: of the blocks that are liked; no effect on `random` and `local`.
    """
    assert kind in INPUTS, kind
    q, k, v = random_inputs(length, heads, kv_heads, head_size, "fp32", device, seed)
    if kind in ("sink", "hot"):
        liked = _liked_blocks(kind, length // block_size, seed)
        for block in liked:
            k[block * block_size : (block + 1) * block_size, :, 0] += _LIKED
        q[..., 0] = q[..., 0].abs() + _ASKED
    elif kind == "local":
        angle = torch.arange(length, device=device) * (math.pi / length)
        near = torch.stack([angle.cos(), angle.sin()], dim=1).unsqueeze(1)
        k[..., :2] += _LIKED * near
        q[..., :2] += _LIKED * near
    return [x.to(DTYPES[dtype]) for x in (q, k, v)]


def _liked_blocks(kind: str, blocks: int, seed: int) -> list[int]:
    if kind == "sink":
        return [0]
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(max(1, blocks), generator=generator)[: max(2, blocks // 64)].tolist()


def past_choices(q: Tensor, k: Tensor, block_size: int, top_k: int) -> Tensor:
    """How many (query, head) pairs of each block chose each past block: int64 [blocks, blocks] on the host."""
    ids = select_blocks(q, k, block_size=block_size, top_k=top_k)[..., 1:].flatten(1).long()
    blocks = -(-q.shape[0] // block_size)
    own = torch.arange(q.shape[0], device=q.device) // block_size
    pairs = (own.unsqueeze(1) * blocks + ids)[ids >= 0]
    return torch.bincount(pairs, minlength=blocks * blocks).view(blocks, blocks).cpu()


def hottest_load(q: Tensor, k: Tensor, block_size: int, top_k: int, router: Router | None = None) -> float:
    """How often the most chosen past block of one document is chosen, over the mean of all blocks."""
    ids = select_blocks(q, k, block_size=block_size, top_k=top_k, router=router)
    chosen = torch.zeros(-(-q.shape[0] // block_size) + 1, dtype=torch.int64, device=q.device)
    for some in ids.split(_TOKENS_AT_ONCE):
        chosen += torch.bincount(some[..., 1:].flatten().long() + 1, minlength=len(chosen))
    counted = chosen[1:].double()  # the first are those that have fewer blocks
    return float(counted.max() / counted.mean()) if counted.any() else 1.0


def counted_ring_factor(choices: Tensor, heads: int, length: int, block_size: int, ranks: int) -> float:
    """`parallel.ring_load.ring_factor` of one document, in pairs of queries and keys.

    Args:
        choices: as `past_choices` gives them.
        heads: query heads.
        ranks: of the ring.
    """
    chunks, blocks = 2 * ranks, choices.shape[0]
    edges = torch.arange(chunks + 1, dtype=torch.double) * (length / chunks)
    starts = torch.arange(blocks, dtype=torch.double) * block_size
    ends = (starts + block_size).clamp(max=length)
    # Tokens of each block in each chunk: [blocks, chunks].
    tokens = (torch.minimum(ends[:, None], edges[1:]) - torch.maximum(starts[:, None], edges[:-1])).clamp(min=0)
    share = tokens / (ends - starts)[:, None]
    work = share.T @ (choices.double() * (ends - starts)) @ share
    work.diagonal().add_(heads * (tokens**2).sum(dim=0) / 2)
    return ring_factor(by_rank(work.tolist()))
