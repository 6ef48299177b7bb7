"""Context parallelism through the kernels in Triton's interpreter: every exchange on two ranks, compared with the
portable backend."""

import torch
import torch.distributed as dist
from distributed import run_ranks
from kernel_examples import cu, inputs, results

from moba_megatron.ops import Router
from moba_megatron.parallel.attention import ContextGroups, context_attention
from moba_megatron.parallel.layout import shard_positions

EXCHANGES = ("p2p", "all_gather", "a2a", "dispatch")
BOUNDS = [0, 8, 8, 40]


def differences() -> dict[str, float]:
    """On one of two ranks: for each exchange, MoBA or full, the largest difference of output and gradients."""
    rank = dist.get_rank()
    mine = shard_positions(torch.tensor(BOUNDS), 2, rank)
    tensors = [x[mine].contiguous() for x in inputs(BOUNDS[-1], 4, 2, size=8)]
    found = {}
    for exchange in EXCHANGES:
        for block_size, top_k in ((5, 3), (None, None)):
            if exchange == "dispatch" and block_size is None:
                continue
            settings = dict(
                cp_groups=ContextGroups(dist.group.WORLD), exchange=exchange, block_size=block_size, top_k=top_k
            )
            got, want = (
                results(lambda *x, b=b, s=settings: context_attention(*x, cu(BOUNDS), backend=b, **s), *tensors)
                for b in ("triton", "gathered")
            )
            found[f"{exchange} {block_size}"] = max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
    return found


def router_differences() -> dict[str, float]:
    """The same of a router that learns: of its loss and of its gradients as well."""
    mine = shard_positions(torch.tensor(BOUNDS), 2, dist.get_rank())
    q, k, v, _ = (x[mine].contiguous() for x in inputs(BOUNDS[-1], 4, 2, size=8))
    generator = torch.Generator().manual_seed(5)
    leaves = [torch.randn(BOUNDS[-1], heads, 6, generator=generator)[mine].requires_grad_() for heads in (2, 1)]
    found = {}
    for exchange in ("p2p", "dispatch"):
        results = []
        for backend in ("triton", "gathered"):
            out, got = context_attention(
                q, k, v, cu(BOUNDS), cp_groups=ContextGroups(dist.group.WORLD), exchange=exchange, block_size=5,
                top_k=4, backend=backend, router=Router(*leaves, "sparse"),
            )  # fmt: skip
            assert got.loss > 0.01
            results.append([out, got.loss.detach(), got.entropy, *torch.autograd.grad(got.loss, leaves)])
        found[exchange] = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
    return found


def test_a_router_on_two_ranks():
    for found in run_ranks(2, router_differences):
        assert len(found) == 2 and all(error <= 1e-5 for error in found.values()), found


def test_every_exchange_on_two_ranks():
    for found in run_ranks(2, differences):
        assert len(found) == 7 and all(error <= 1e-5 for error in found.values()), found
