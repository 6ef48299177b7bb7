"""Sizes of the GPU kernels, in one place for the kernels and for the estimates of planning.

Needs no Triton, which exists only on Linux.
"""

from __future__ import annotations

# Planes of 16 bits that a block's mean in fp32 is written as, for 16-bit queries.
PLANES = 3
# Entries of a block that one program sums dk and dv over: at least so many, and so many for each key of the block.
SPLIT_ENTRIES, SPLIT_ENTRIES_PER_KEY = 512, 4
# Up to this block size, with heads of up to 128, keys and values of a block stay in a tile, and one kernel makes dk, dv
# and dq.
SHORT_BLOCK = 128
# Routing of 16-bit queries screens blocks by one plane of their centred means: query rows of a tile, and the most past
# blocks that are chosen so. From so many blocks of a pack on that takes less time than three planes at once, by
# `planning.kernel_model` on an H100: so many for each past block (a power of two, at least 2), but no more than the
# second number.
SCREENED_ROWS, MOST_SCREENED = 128, 16
SCREENED_BLOCKS_PER_PAST, SCREENED_BLOCKS = 256, 2048
# Cuts into passes change the order of sums: never a share of the memory that happens to be free.
SMALLEST_WORKSPACE = 2**31


def default_workspace(query_bytes: int) -> int:
    """Bytes of workspace where the caller names none: q's size, at least 2 GiB.

    >>> default_workspace(2**32), default_workspace(1000)
    (4294967296, 2147483648)
    """
    return max(SMALLEST_WORKSPACE, query_bytes)


def screens(num_blocks: int, num_past: int, element_bytes: int) -> bool:
    """Whether routing screens blocks before it scores a few of them exactly: a rule on shapes, never on data.

    Args:
        num_blocks: of the pack, or its upper bound.
        num_past: past blocks to choose.
        element_bytes: of the queries.

    >>> screens(2048, 15, 2), screens(1024, 15, 2), screens(512, 2, 2), screens(2048, 15, 4)
    (True, False, True, False)
    """
    if element_bytes != 2 or not 0 < num_past <= MOST_SCREENED:
        return False
    return num_blocks >= min(SCREENED_BLOCKS, SCREENED_BLOCKS_PER_PAST * power_of_two(max(2, num_past)))


def power_of_two(number: int) -> int:
    """The least power of two that is not smaller.

    >>> power_of_two(15), power_of_two(16), power_of_two(1)
    (16, 16, 1)
    """
    return 1 << (number - 1).bit_length()


# Entry numbers of a pass are int32.
MOST_ENTRIES = 2**31 - 1


def forward_entry_bytes(head_size: int, element_bytes: int) -> int:
    """Workspace for an entry: its partial output, log-sum-exp, kv block and place in the index."""
    return head_size * element_bytes + 12


def backward_entry_bytes(head_size: int, element_bytes: int) -> int:
    """Workspace for an entry: its partial dq, kv block, place in the index, and at most its part of the partial dk and
    dv."""
    return head_size * (element_bytes + 2) + 8


def pass_sizes(
    tokens: int, kv_heads: int, qheads_per_kvhead: int, slots: int, entry_bytes: int, workspace_bytes: int
) -> tuple[int, int]:
    """(kv heads, tokens) of a pass: of as few passes of about one size as fit the workspace, cut by kv heads and then
    by tokens.

    >>> pass_sizes(1000, 8, 4, 15, 100, 10**9), pass_sizes(1000, 8, 4, 15, 100, 2 * 10**7)
    ((8, 1000), (3, 1000))
    >>> pass_sizes(1000, 8, 4, 15, 100, 5 * 10**6), pass_sizes(1000, 8, 4, 0, 100, 1)
    ((1, 500), (8, 1000))
    """
    if slots == 0:
        return kv_heads, max(1, tokens)
    per_token = qheads_per_kvhead * slots
    most = max(per_token, min(workspace_bytes // entry_bytes, MOST_ENTRIES))
    return even_step(kv_heads, most // max(1, tokens * per_token)), even_step(tokens, most // per_token)


def even_step(count: int, most: int) -> int:
    """The step, at most `most` but at least 1, that cuts `count` into as few and equal steps as it allows.

    >>> even_step(10, 9), even_step(8, 100), even_step(0, 5)
    (5, 8, 1)
    """
    steps = -(-count // max(1, most))
    return max(1, -(-count // max(1, steps)))
