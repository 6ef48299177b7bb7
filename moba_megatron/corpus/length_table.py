"""Documents and tokens by document length."""

from __future__ import annotations

import numpy as np

POWERS = 32


def length_table(lengths: np.ndarray) -> np.ndarray:
    """Documents and tokens for each power of two: int64 [32, 2]; row i is for 2**i to 2**(i+1) - 1 tokens.

    Args:
        lengths: integers [documents], in tokens, at least 1.

    >>> length_table(np.array([1, 2, 3, 9]))[:4].tolist()
    [[1, 1], [2, 5], [0, 0], [1, 9]]
    """
    powers = np.log2(lengths).astype(np.int64)
    documents, tokens = np.bincount(powers, minlength=POWERS), np.bincount(powers, lengths, minlength=POWERS)
    return np.stack([documents, tokens.astype(np.int64)], axis=1)
