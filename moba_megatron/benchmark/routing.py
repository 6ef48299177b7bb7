"""A router in the benchmark (`--router-dim`): its inputs, and the gate that its choice and its loss pass.

The projections of the hidden states, the norm and the rotation are no part of the operator, and not measured.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moba_megatron.benchmark.settings import BenchRouter
from moba_megatron.ops import Router, moba_attention

Attention = Callable[..., Tensor | tuple[Tensor, Tensor]]
# Units of the last place, over sums of thousands of terms.
_ROUNDING = 64


def routed(router: BenchRouter, backend: str, block_size: int, top_k: int, mode: str) -> Attention:
    """The operator on q [T, N, D], k and v [T, G, D], router queries [T, H, C] and router keys [T, J, C]: the output,
    and in the mode `fwd+bwd` the loss, if the router has one."""
    loss = router.loss if mode == "fwd+bwd" else "none"

    def operator(q: Tensor, k: Tensor, v: Tensor, *of_router: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        found = moba_attention(
            q, k, v, block_size=block_size, top_k=top_k, backend=backend, router=Router(*of_router, loss)
        )
        return (found[0], found[1].loss) if isinstance(found, tuple) else found

    return operator


def loss_disagreement(
    router: BenchRouter, backend: str, tensors: list[Tensor], block_size: int, top_k: int
) -> str | None:
    """Why the loss of a router, or its gradients, are not the definition's in fp64; None if they are. Allowed is twice
    the error of the definition in the inputs' own dtype, plus rounding.

    Args:
        tensors: as for `routed`.
    """
    if router.loss == "none":
        return None
    want = _loss(router, "reference", [x.double() for x in tensors], block_size, top_k)
    plain = _loss(router, "reference", tensors, block_size, top_k)
    got = _loss(router, backend, tensors, block_size, top_k)
    units = _ROUNDING * torch.finfo(tensors[0].dtype).eps
    for name, a, b, c in zip(("loss", "dq of the router", "dk of the router"), got, want, plain, strict=True):
        error, bound = _mean(a - b), 2 * _mean(c - b) + units * _mean(b)
        if not error <= bound:
            return f"{name} differs from the reference by {error:.2e} (mean error), allowed {bound:.2e}"
    return None


def _mean(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _loss(router: BenchRouter, backend: str, tensors: list[Tensor], block_size: int, top_k: int) -> list[Tensor]:
    """The loss, and its gradients to the router's queries and keys."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors[3:]]
    found = routed(router, backend, block_size, top_k, "fwd+bwd")(*tensors[:3], *leaves)
    return [found[1].detach(), *torch.autograd.grad(found[1], leaves)]
