"""Sizes of the GPU kernels that others reckon with: what planning foretells and what the kernels do is asked here.

Needs no Triton, which exists on Linux alone.
"""

from __future__ import annotations

# Planes of 16 bits that a block's mean in fp32 is written as, for 16-bit queries.
PLANES = 3
# Entries of a block that one program sums dk and dv over: at least so many, and so many for each key of the block.
SPLIT_ENTRIES, SPLIT_ENTRIES_PER_KEY = 512, 4
# Up to this block size, with heads of up to 128, keys and values of a block stay in a tile, and one kernel makes dk, dv
# and dq.
SHORT_BLOCK = 128
# Cuts into passes change the order of sums: never a share of the memory that happens to be free.
SMALLEST_WORKSPACE = 2**31


def default_workspace(query_bytes: int) -> int:
    """Bytes of workspace where the caller names none: q's size, at least 2 GiB.

    >>> default_workspace(2**32), default_workspace(1000)
    (4294967296, 2147483648)
    """
    return max(SMALLEST_WORKSPACE, query_bytes)
