"""Where the blocks of a packed batch lie: integer arithmetic on document boundaries, and the checks of the operator's
inputs.

Blocks start anew at each document, so a block has two numbers: its number *within its document* (what users and
selections speak of) and its number *within the pack* (what indexes summaries). `first_block` translates between them.
Everything here is a tensor of integers on the inputs' device. Values of `cu_seqlens` are read on the host only when
they already live there; on an accelerator that would stall it, so the number of blocks is then the bound T // B +
documents, and unused numbers belong to empty blocks.

Legend: T tokens, N query heads, G kv heads, D head size, B block size, M blocks of the pack, docs documents.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBlocks:
    """The blocks of some tokens of a pack, in rising order of the tokens.

    Attributes:
        num_blocks: M, blocks of all documents of the pack together (an upper bound where cu_seqlens lives on an
            accelerator).
        block_T: int64 [T], number of each token's block within its document.
        first_block_T: int64 [T], pack-wide number of the first block of each token's document.
    """

    num_blocks: int
    block_T: Tensor
    first_block_T: Tensor

    @property
    def pack_block_T(self) -> Tensor:
        """int64 [T], pack-wide number of each token's block."""
        return self.first_block_T + self.block_T


@dataclass(frozen=True)
class BlockLayout(TokenBlocks):
    """The blocks of one pack, for all of its tokens.

    Attributes:
        num_tokens: T.
        block_size: B, in tokens.
        max_blocks: blocks of the longest document (an upper bound where cu_seqlens lives on an accelerator, unless
            `max_seqlen` was given).
        cu_seqlens: int64 [docs + 1], document boundaries in tokens.
        first_block: int64 [docs + 1], pack-wide number of each document's first block; its last entry is the true M.
        document_T: int64 [T], document of each token.
        device_forms: what backends make of it, by name, made once and kept with it (`triton.fragments.whole_pack`).
    """

    num_tokens: int
    block_size: int
    max_blocks: int
    cu_seqlens: Tensor
    first_block: Tensor
    document_T: Tensor
    device_forms: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def at(self, positions: Tensor) -> TokenBlocks:
        """The blocks of the tokens at these positions of the pack (int64, rising)."""
        return TokenBlocks(self.num_blocks, self.block_T[positions], self.first_block_T[positions])

    def block_lengths(self) -> Tensor:
        """int64 [num_blocks], tokens of every block; 0 for the unused numbers of an upper bound."""
        return self.block_ends() - self.block_starts()

    def block_rows(self) -> list[tuple[int, int]]:
        """(first token, one past the last) of every block. Reads the layout on the host, once."""
        return self._block_rows

    @functools.cached_property
    def _block_rows(self) -> list[tuple[int, int]]:
        starts = self.block_starts()
        return list(zip(starts.tolist(), (starts + self.block_lengths()).tolist(), strict=True))

    def block_starts(self) -> Tensor:
        """int64 [num_blocks], first token of every block; T for the unused numbers of an upper bound."""
        return self._block_bounds[0]

    def block_ends(self) -> Tensor:
        """int64 [num_blocks], one past the last token of every block; T for the unused numbers of an upper bound."""
        return self._block_bounds[1]

    @functools.cached_property
    def _block_bounds(self) -> tuple[Tensor, Tensor]:
        # Blocks follow each other without a gap.
        if self.cu_seqlens.numel() == 2:
            size, device = self.block_size, self.cu_seqlens.device
            starts = torch.arange(0, self.num_blocks * size, size, device=device).clamp_(max=self.num_tokens)
            return starts, (starts + size).clamp_(max=self.num_tokens)
        blocks = torch.arange(self.num_blocks, device=self.cu_seqlens.device)
        document = torch.searchsorted(self.first_block[1:], blocks, right=True).clamp_(max=self.cu_seqlens.numel() - 2)
        starts = self.cu_seqlens[document] + (blocks - self.first_block[document]) * self.block_size
        starts = torch.where(blocks < self.first_block[-1], starts, self.num_tokens)
        return starts, torch.cat([starts[1:], starts.new_full((1,), self.num_tokens)])

    def equal_blocks(self) -> list[tuple[int, int, int]]:
        """Adjacent equally long blocks as (first token, blocks, tokens per block), in order of tokens.

        A document gives at most two: its full blocks, and its short last one. Reads cu_seqlens on the host, once per
        layout, and so checks its values wherever it lies.

        Raises:
            ValueError: boundaries that do not run from 0 to T without falling.
        """
        return self._equal_blocks

    @functools.cached_property
    def _equal_blocks(self) -> list[tuple[int, int, int]]:
        bounds = self.cu_seqlens.tolist()
        _check_boundaries(bounds, self.num_tokens)
        found = []
        for start, end in itertools.pairwise(bounds):
            full, tail = divmod(end - start, self.block_size)
            if full:
                found.append((start, full, self.block_size))
            if tail:
                found.append((end - tail, 1, tail))
        return found


def block_layout(
    num_tokens: int,
    block_size: int,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    device: torch.device | str | None = None,
) -> BlockLayout:
    """Lay out the blocks of a pack.

    Args:
        num_tokens: T, tokens in the pack.
        block_size: B, tokens in a block, at least 1.
        cu_seqlens: integer [docs + 1], document boundaries from 0 to T; None for one document.
        max_seqlen: an upper bound on the longest document, in tokens, for where cu_seqlens may not be read.
        device: where the tensors live when cu_seqlens is None.

    >>> layout = block_layout(7, 2, torch.tensor([0, 5, 7]))
    >>> layout.block_T.tolist(), layout.pack_block_T.tolist()
    ([0, 0, 1, 1, 2, 0, 0], [0, 0, 1, 1, 2, 3, 3])
    >>> layout.equal_blocks()
    [(0, 2, 2), (4, 1, 1), (5, 1, 2)]
    """
    if cu_seqlens is None:
        return _one_document(num_tokens, block_size, device)
    cu = cu_seqlens.to(torch.int64)
    blocks_of_document = (cu[1:] - cu[:-1] + block_size - 1) // block_size
    first_block = torch.cat([cu.new_zeros(1), blocks_of_document.cumsum(0)])
    if cu.device.type == "cpu":
        longest = int((cu[1:] - cu[:-1]).max())
        num_blocks = int(first_block[-1])
    elif cu.numel() > 2:
        longest = num_tokens if max_seqlen is None else min(max_seqlen, num_tokens)
        num_blocks = num_tokens // block_size + cu.numel() - 1
    else:
        longest, num_blocks = num_tokens, -(-num_tokens // block_size)
    tokens = torch.arange(num_tokens, device=cu.device)
    document_T = torch.searchsorted(cu[1:], tokens, right=True).clamp_(max=cu.numel() - 2)
    return BlockLayout(
        num_tokens=num_tokens,
        block_size=block_size,
        num_blocks=num_blocks,
        max_blocks=-(-longest // block_size),
        cu_seqlens=cu,
        first_block=first_block,
        document_T=document_T,
        block_T=(tokens - cu[document_T]) // block_size,
        first_block_T=first_block[document_T],
    )


def _one_document(num_tokens: int, block_size: int, device: torch.device | str | None) -> BlockLayout:
    num_blocks = -(-num_tokens // block_size)
    # Made on the device: copying numbers there would make the host wait.
    ends = torch.arange(2, device=device)
    zeros_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    return BlockLayout(
        num_tokens=num_tokens,
        block_size=block_size,
        num_blocks=num_blocks,
        max_blocks=num_blocks,
        cu_seqlens=ends * num_tokens,
        first_block=ends * num_blocks,
        document_T=zeros_T,
        block_T=torch.arange(num_tokens, device=device) // block_size,
        first_block_T=zeros_T,
    )


def check_inputs(tensors: dict[str, Tensor], cu_seqlens: Tensor | None) -> None:
    """Check shapes, dtypes and devices of q, k (and v), and the values of cu_seqlens where they lie on the host.

    Raises:
        ValueError: with the offending names and values, and what would be right.
    """
    q, k = tensors["q"], tensors["k"]
    for name, tensor in tensors.items():
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be [tokens, heads, head size], got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"q and {name} must have one dtype, got {q.dtype} and {tensor.dtype}; cast one of them")
        if tensor.device != q.device:
            raise ValueError(
                f"q and {name} must be on one device, got {q.device} and {tensor.device}; move one of them"
            )
        if (
            tensor.shape[0] != q.shape[0]
            or tensor.shape[2] != q.shape[2]
            or tensor.shape[1] != (q if name == "q" else k).shape[1]
        ):
            raise ValueError(
                "q [T, N, D], k and v [T, G, D] must agree in T, G and D, got "
                + ", ".join(f"{n} {tuple(t.shape)}" for n, t in tensors.items())
            )
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of key heads, got N = {num_heads} and G = {num_kv_heads}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape[0], q.device)


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> None:
    """Check the document boundaries of a pack; their values only if they lie on the host. Raises ValueError."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "cu_seqlens must be int32 [documents + 1] with at least one document, "
            f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and q on {device}; move cu_seqlens to {device}")
    if cu_seqlens.device.type == "cpu":
        _check_boundaries(cu_seqlens.tolist(), num_tokens)


def _check_boundaries(bounds: list[int], num_tokens: int) -> None:
    if bounds[0] != 0 or bounds[-1] != num_tokens:
        raise ValueError(
            f"cu_seqlens must run from 0 to the number of tokens, {num_tokens}; "
            f"it runs from {bounds[0]} to {bounds[-1]}"
        )
    for at, (before, after) in enumerate(itertools.pairwise(bounds), start=1):
        if after < before:
            raise ValueError(f"cu_seqlens must not fall, but {before} is followed by {after} at {at}")


def check_settings(block_size: int, top_k: int, workspace_bytes: int | None = None) -> None:
    """Check block size (tokens), top-k (blocks, the current one counted) and workspace. Raises ValueError."""
    settings = {"block_size": block_size, "top_k": top_k, "workspace_bytes": workspace_bytes}
    for name, value in settings.items():
        if name == "workspace_bytes" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
