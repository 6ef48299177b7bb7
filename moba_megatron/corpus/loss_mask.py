"""Which tokens of a dataset count as targets: PREFIX.loss_mask.bin, which `prepare` writes for prompts and answers.

One byte for each token of PREFIX.bin, in the same order: 1 is a token whose prediction counts in the loss, 0 one that
does not (a prompt). Without the file every token counts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

_CHUNK = 2**24


def loss_mask_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.loss_mask.bin")


def open_loss_mask(prefix: str | Path) -> np.ndarray | None:
    """The mask of a dataset, memory-mapped [tokens] uint8; None if it has none."""
    path = loss_mask_path(prefix)
    return np.memmap(path, np.uint8, "r") if path.is_file() else None


def check_loss_mask(prefix: str | Path, token_bytes: int, wanted: bool = False) -> None:
    """Check that the mask of a dataset, if it has one, fits PREFIX.bin.

    Args:
        token_bytes: bytes of a token in PREFIX.bin.
        wanted: the manifest says that there is one.

    Raises:
        ValueError: a mask that is missing, of the wrong size, with other values than 0 and 1, or under which nothing
            counts.
    """
    path = loss_mask_path(prefix)
    if not path.is_file():
        if wanted:
            raise ValueError(
                f"{path} is missing, but the manifest says that not every token counts in the loss: copy it again, or "
                "prepare the data again"
            )
        return
    tokens, found = Path(f"{prefix}.bin").stat().st_size // token_bytes, path.stat().st_size
    if found != tokens:
        raise ValueError(
            f"{path} has {found} bytes, but {prefix}.bin has {tokens} tokens, one byte each: prepare the data again, "
            "or remove the mask to train on every token"
        )
    mask = np.memmap(path, np.uint8, "r")
    largest = int(mask[:_CHUNK].max(initial=0))
    if largest > 1:
        raise ValueError(f"{path} holds the byte {largest}: only 0 (does not count) and 1 (counts) are valid")
    if not any(mask[start : start + _CHUNK].any() for start in range(0, tokens, _CHUNK)):
        raise ValueError(f"{path} is 0 everywhere, so no token would count: prepare the data again, or remove it")
