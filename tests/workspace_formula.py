"""The memory of the kernels beside inputs, outputs and gradients, as the docstring of `ops.triton.attention` has it."""

from __future__ import annotations

# Boundaries, splits and rounding: "a few times 8 bytes for each token and block".
SLACK = 64


def workspace_bounds(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    element_bytes: int,
    block_size: int,
    top_k: int,
    workspace_bytes: int,
) -> tuple[int, int]:
    """Bytes that a forward and a backward pass over one document may hold under a workspace.

    >>> workspace_bounds(1024, 4, 2, 16, 4, 64, 3, 10**6)[0] == 8192 * 76 + 8 * 32 * 4 + 64 * (1024 + 32)
    True
    """
    per_token, blocks = heads // kv_heads * (top_k - 1), -(-tokens // block_size)
    bounds = []
    for entry_bytes, sums in ((head_size * element_bytes + 12, 0), (head_size * (element_bytes + 2) + 8, 16)):
        most = max(per_token, workspace_bytes // entry_bytes)
        at_once = max(1, min(kv_heads, most // (tokens * per_token)))
        entries = min(most, at_once * tokens * per_token)
        head_blocks = at_once * blocks
        chunks = min(1024 // at_once, -(-entries // (at_once * 1024)))
        kept = entries * entry_bytes + 8 * head_blocks * chunks + sums * head_size * tokens * at_once
        bounds.append(kept + SLACK * (tokens + head_blocks))
    return bounds[0], bounds[1]
