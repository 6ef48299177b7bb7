"""A router of its own: queries and keys that choose blocks, beside those that attend (`attention.router: index`).

A router has one choice per key head or per query head, and keys of each key head or one shared by all. A block's
summary is the mean of its router keys, and the choice is that of MoBA with the router's queries and summaries in place
of the attention's. Selection is a constant here as there; what teaches a router is its loss (`ops.router_loss`).

Legend: T tokens, N query heads, G key heads, R = N / G, D head size, H router heads (G or N), J router key heads (1 or
G), C router head size, K past blocks per query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.precision import score_dtype
from moba_megatron.ops.selection import Selection

LOSSES = ("none", "sparse", "dense")


@dataclass(frozen=True)
class Router:
    """What chooses blocks instead of q and k.

    Attributes:
        q: router queries [T, H, C] after norm and rotary embedding, in the dtype and on the device of the attention's
            q; H is G (the query heads of a key head choose together) or N.
        k: router keys [T, J, C], likewise; J is 1 (shared by all heads) or G.
        loss: `none`; `sparse`: over the chosen past blocks; `dense`: over all past blocks (`ops.router_loss`).
        loss_mask: [T], 1 (or true) where a token's loss counts; None: everywhere.
    """

    q: Tensor
    k: Tensor
    loss: str = "none"
    loss_mask: Tensor | None = None

    @property
    def learns(self) -> bool:
        """Whether a call returns a loss as well."""
        return self.loss != "none"


@dataclass(frozen=True)
class RouterLoss:
    """The loss of a router in one layer, summed over tokens.

    Attributes:
        loss: scalar in fp32 or wider: the sum over the tokens that count of their loss, each the mean over router
            heads. Differentiable in the router's q and k only.
        entropy: scalar, no gradient: over the same tokens, of the entropy of the router's shares, in nats.
        tokens: scalar, no gradient: how many tokens counted.
    """

    loss: Tensor
    entropy: Tensor
    tokens: Tensor


def check_router(router: Router, q: Tensor, num_kv_heads: int, selection: Selection) -> None:
    """Check that a router fits the attention's queries [T, N, D] and the selection.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not go together, with the values and what would be
            right.
    """
    num_tokens, num_heads = q.shape[:2]
    for name, tensor in (("router.q", router.q), ("router.k", router.k)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be [tokens, heads, router head size], got shape {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"q and {name} must have one dtype and device, got {q.dtype} on {q.device} and {tensor.dtype} on "
                f"{tensor.device}; cast or move one of them"
            )
        if tensor.shape[0] != num_tokens:
            raise ValueError(f"{name} must have the {num_tokens} tokens of q, got {tensor.shape[0]}")
    if router.q.shape[2] != router.k.shape[2] or router.q.shape[2] == 0:
        raise ValueError(
            f"router.q and router.k must have one head size of at least 1, got {router.q.shape[2]} and "
            f"{router.k.shape[2]}"
        )
    if router.q.shape[1] not in (num_kv_heads, num_heads):
        raise ValueError(
            f"router.q has {router.q.shape[1]} heads: give one for each of the {num_kv_heads} key heads, or for each "
            f"of the {num_heads} query heads"
        )
    if router.k.shape[1] not in (1, num_kv_heads):
        raise ValueError(
            f"router.k has {router.k.shape[1]} heads: give one that is shared, or one for each of the {num_kv_heads} "
            "key heads"
        )
    check_router_selection(selection)
    if selection.shared and (router.q.shape[1], router.k.shape[1]) != (num_heads, num_kv_heads):
        raise ValueError(
            f"share_selection = {selection.share_selection!r} with a router of {router.q.shape[1]} heads and "
            f"{router.k.shape[1]} key heads: it needs a router head for each of the {num_heads} query heads and a "
            f"router key head for each of the {num_kv_heads} key heads; leave it out"
        )
    if router.loss not in LOSSES:
        raise ValueError(f"router.loss = {router.loss!r}: choose one of {', '.join(LOSSES)}")
    mask = router.loss_mask
    if mask is not None and (tuple(mask.shape) != (num_tokens,) or mask.device != q.device):
        raise ValueError(
            f"router.loss_mask must be [{num_tokens}] on {q.device}, got {tuple(mask.shape)} on {mask.device}"
        )


def check_router_selection(selection: Selection) -> None:
    """Refuse selections that a router cannot make. Raises ValueError."""
    if not selection.uses_scores:
        raise ValueError(
            f"selector = {selection.selector!r} looks at no scores, so a router has no effect: use top_k or threshold, "
            "or leave the router out"
        )
    if not selection.uses_means:
        raise ValueError(f"summary = {selection.summary!r} with a router: a router is scored against means; use mean")


def check_router_backend(router: Router | None, backend: str) -> None:
    """Refuse a router for a backend that chooses by itself. Raises ValueError."""
    if router is not None and backend == "flash_moba":
        raise ValueError(
            "backend 'flash_moba' chooses blocks by q and k itself and takes no router; use another backend"
        )


def for_heads(ids_THK: Tensor, num_heads: int) -> Tensor:
    """Ids of router heads as those of N query heads: [T, N, K].

    >>> for_heads(torch.tensor([[[3], [5]]]), 4).flatten().tolist()
    [3, 3, 5, 5]
    """
    repeat = num_heads // ids_THK.shape[1]
    return ids_THK if repeat == 1 else ids_THK.repeat_interleave(repeat, dim=1)


def counted_tokens(router: Router) -> Tensor:
    """Scalar: tokens whose loss counts."""
    if router.loss_mask is None:
        return torch.full((), router.q.shape[0], dtype=torch.float64, device=router.q.device)
    return router.loss_mask.detach().sum(dtype=torch.float64)


def no_loss(router: Router) -> RouterLoss:
    """The loss where there is nothing to choose, connected to the router."""
    dtype = score_dtype(router.q.dtype)
    loss = (router.q.sum() + router.k.sum()).to(dtype) * 0
    return RouterLoss(loss, torch.zeros_like(loss, requires_grad=False), counted_tokens(router).to(dtype))
