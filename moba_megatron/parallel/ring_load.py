"""How unevenly a ring of context-parallel ranks works under MoBA.

In each step of a ring (`p2p`) every rank attends the keys of one other rank, and the next step starts when the slowest
is through. The zigzag layout gives all ranks the same work over all steps, and under full attention in every step. MoBA
does not: which keys a query chooses decides in which step it has work. What a ring takes is therefore the sum over the
steps of the busiest rank's work; over the work of one rank this is the factor here.

The estimate is for random choice, each past block as likely as any other. Trained choice is less even: it prefers the
first block, a few others, and near ones.
"""

from __future__ import annotations

import functools

# Query positions looked at in each of the 2 C chunks of a document.
_SAMPLES = 8


@functools.cache
def random_choice_factor(ranks: int, blocks: float, top_k: float) -> float:
    """Time of a ring over the work of one rank, for random choice. With less than a block in each of the 2 C chunks
    of a document it is rough: a query's own block counts in its own chunk.

    Args:
        ranks: of the ring.
        blocks: of one document.
        top_k: blocks of a query, its own counted.

    >>> random_choice_factor(1, 64, 3)
    1.0
    >>> round(random_choice_factor(8, 2048, 8), 2)
    1.84
    """
    if top_k >= blocks:
        return 1.0  # full attention
    chunks, size = 2 * ranks, blocks / (2 * ranks)
    work = [[0.0] * chunks for _ in range(chunks)]
    for query in range(chunks):
        for sample in range(_SAMPLES):
            past = (query + (sample + 0.5) / _SAMPLES) * size
            chosen = min(top_k - 1.0, past) / past
            for key in range(query):
                work[query][key] += chosen * size
            # Of its own block a query attends half, on average.
            work[query][query] += chosen * (past - query * size) + 0.5
    return ring_factor(by_rank(work))


def by_rank(work: list[list[float]]) -> list[list[float]]:
    """Work of each rank with the keys of each, from that of chunks: rank r of C holds chunks r and 2 C - 1 - r.

    >>> by_rank([[1, 0, 0, 0], [2, 1, 0, 0], [2, 2, 1, 0], [2, 2, 2, 1]])
    [[4, 4], [4, 4]]
    """
    ranks = len(work) // 2
    held = [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)]
    return [[sum(work[q][k] for q in mine for k in theirs) for theirs in held] for mine in held]


def ring_factor(work: list[list[float]]) -> float:
    """Sum over the steps of a ring of the busiest rank's work, over the mean work of a rank.

    Args:
        work: `work[r][s]`, of the queries of rank r with the keys of rank s.

    >>> ring_factor([[1, 1], [1, 1]]), ring_factor([[2, 0], [1, 1]])
    (1.0, 1.5)
    """
    ranks = len(work)
    steps = [max(work[rank][(rank - step) % ranks] for rank in range(ranks)) for step in range(ranks)]
    return ranks * sum(steps) / sum(map(sum, work))
