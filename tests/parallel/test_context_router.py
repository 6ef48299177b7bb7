"""A router under every exchange gives what one rank gives by the definition: outputs, loss, and all gradients."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from parallel.examples import HEAD_SIZE, groups_for, pack_inputs, smallest_margin, zigzag
from torch.utils.checkpoint import checkpoint

from moba_megatron.ops import Router, RouterLoss, moba_attention
from moba_megatron.ops.selection import MOBA, Selection
from moba_megatron.parallel.attention import ContextGroups, context_attention
from moba_megatron.parallel.context_plan import plan_context
from moba_megatron.parallel.exchange_kind import RankSizes
from moba_megatron.parallel.exchanges import EXCHANGES as TABLE
from moba_megatron.parallel.exchanges import RouterSizes, router_traffic, traffic
from moba_megatron.parallel.summaries import most_touched
from moba_megatron.parallel.wire import observe

pytestmark = pytest.mark.once
ROUTER_SIZE = 6
# Boundaries, block size, top-k: blocks that straddle ranks and chunks, of one token, fewer than K; none chosen.
CASES = [
    ([0, 96], 5, 4),
    ([0, 16, 16, 72, 96], 16, 3),
    ([0, 16, 16, 72, 96], 4, 6),
    ([0, 8, 16, 24, 40, 48, 96], 5, 3),
    ([0, 96], 20, 8),
    ([0, 96], 60, 1),
    ([0, 96], 5, [4, 2, 1, 3]),  # a K for each key head
]
# Query heads, key heads, router heads, router key heads.
HEADS = [(8, 4, 4, 1), (8, 4, 4, 4), (8, 4, 8, 4), (4, 4, 4, 1)]
EXCHANGES = {
    2: [name for name, kind in TABLE.items() if not kind.two_levels],
    4: list(TABLE),
}


def router_inputs(tokens: int, heads: int, key_heads: int):
    """Router queries and keys in fp64, and which tokens count."""
    generator = torch.Generator().manual_seed(11)
    q, k = (torch.randn(tokens, n, ROUTER_SIZE, generator=generator, dtype=torch.float64) for n in (heads, key_heads))
    return q, k, (torch.rand(tokens, generator=generator) > 0.2).double()


def run(attention, q, k, v, do, router_q, router_k, mask, loss="sparse"):
    """Out, loss, entropy, tokens, and gradients of a weighted sum to q, k, v and the router's q and k."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, router_q, router_k)]
    out, got = attention(*leaves[:3], router=Router(*leaves[3:], loss, mask))
    gradients = torch.autograd.grad((out * do).sum() + 3 * got.loss, leaves)
    return out.detach(), got.loss.detach(), got.entropy, got.tokens, gradients


def disagreements() -> dict[str, list[str]]:
    """On one of several ranks: for each exchange the cases that disagree with the definition."""
    size, rank = dist.get_world_size(), dist.get_rank()
    cp_groups = {exchange: groups_for(exchange) for exchange in EXCHANGES[size]}
    wrong = {exchange: [] for exchange in cp_groups}
    for number, (bounds, block_size, top_k) in enumerate(CASES):
        for heads in HEADS if number == 1 else HEADS[number % 4 :][:1]:
            tensors = pack_inputs(bounds[-1], *heads[:2], seed=number)
            of_router = router_inputs(bounds[-1], *heads[2:])
            most = max(top_k) if isinstance(top_k, list) else top_k
            assert smallest_margin(of_router[0], of_router[1], bounds, block_size, most) > 1e-9
            settings = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "block_size": block_size, "top_k": top_k}
            # The last heads choose by a threshold.
            selection = Selection("threshold", threshold=0.6) if heads == HEADS[-1] else MOBA
            definition = functools.partial(moba_attention, backend="reference", **settings, **selection.settings)
            expected = run(definition, *tensors, *of_router)
            settings["selection"] = selection
            mine = torch.tensor(zigzag(bounds, size, rank))
            for exchange, groups in cp_groups.items():
                attention = functools.partial(context_attention, cp_groups=groups, exchange=exchange, **settings)
                out, *sums, gradients = run(attention, *(x[mine] for x in (*tensors, *of_router)))
                sums = torch.stack(sums)
                dist.all_reduce(sums)
                errors = {"out": (out - expected[0][mine]).abs().max().item()}
                for what, total, whole in zip(("loss", "entropy", "tokens"), sums, expected[1:4], strict=True):
                    errors[what] = abs(total.item() - whole.item())
                assert most == 1 or expected[1] > 0.1
                for what, part, whole in zip(
                    ("q", "k", "v", "router q", "router k"), gradients, expected[4], strict=True
                ):
                    errors[f"gradient of {what}"] = (part - whole[mine]).abs().max().item()
                wrong[exchange] += [
                    f"{what} {bounds} {heads} B={block_size} K={top_k}: {error}"
                    for what, error in errors.items()
                    if not error <= 1e-10
                ]
    return wrong


@functools.cache
def results(size: int) -> list[dict[str, list[str]]]:
    return run_ranks(size, disagreements, timeout=300)


@pytest.mark.parametrize(("size", "exchange"), [(size, name) for size in EXCHANGES for name in EXCHANGES[size]])
def test_exchanges_equal_the_definition(size, exchange):
    for rank, wrong in enumerate(results(size)):
        assert not wrong[exchange], (rank, wrong[exchange][:10])


def dense_disagreements() -> list[str]:
    """On one of several ranks under a2a: where the dense loss differs from the definition's."""
    size, rank, wrong = dist.get_world_size(), dist.get_rank(), []
    for number, heads in enumerate(HEADS):
        bounds, block_size, top_k = CASES[number]
        tensors, of_router = pack_inputs(bounds[-1], *heads[:2]), router_inputs(bounds[-1], *heads[2:])
        settings = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "block_size": block_size}
        mine = torch.tensor(zigzag(bounds, size, rank))
        # Some blocks, none, and so many that auto attends fully.
        for chosen in (top_k, 1, 200):
            expected = run(
                functools.partial(moba_attention, backend="reference", top_k=chosen, **settings),
                *tensors, *of_router, loss="dense",
            )  # fmt: skip
            attention = functools.partial(
                context_attention, cp_groups=ContextGroups(dist.group.WORLD), exchange="a2a", top_k=chosen, **settings
            )
            out, *sums, gradients = run(attention, *(x[mine] for x in (*tensors, *of_router)), loss="dense")
            sums = torch.stack(sums)
            dist.all_reduce(sums)
            pairs = zip([out, sums, *gradients], [expected[0][mine], torch.stack(expected[1:4]),
                        *(x[mine] for x in expected[4])], strict=True)  # fmt: skip
            errors = [(a - b).abs().max().item() for a, b in pairs]
            wrong += [] if max(errors) <= 1e-10 and expected[1] > 0.1 else [f"{bounds} {heads} K={chosen}: {errors}"]
    return wrong


@pytest.mark.parametrize("size", [2, 4])
def test_the_dense_loss_under_a2a_equals_the_definition(size):
    assert run_ranks(size, dense_disagreements) == [[]] * size


def bytes_that_differ(exchange, attention, tensors) -> list[str]:
    """Where what travels is not what the formulas say, or under dispatch more than that."""
    plan = plan_context(attention.keywords["cu_seqlens"], 5, (1, 2), dist.get_rank(), torch.device("cpu"))
    sizes, wrong = RankSizes(48, 4, 2, HEAD_SIZE, 4, 5, 4), []
    for loss in ("none", "sparse", *["dense"] * (exchange == "a2a")):
        leaves = [x.clone().requires_grad_() for x in tensors[4:6]]
        with observe() as forward:
            found = attention(*tensors[:3], router=Router(*leaves, loss, torch.ones(48)))
        with observe() as backward:
            if loss != "none":
                found[1].loss.backward()
        router = RouterSizes(2, 1, ROUTER_SIZE, loss)
        more = router_traffic(exchange, sizes, router, 2, touched=most_touched(plan), blocks=plan.layout.num_blocks)
        expected = (traffic(exchange, sizes, 2).forward + more.forward, more.backward)
        got = (forward.total - forward.received["plan"] * (exchange == "dispatch"), backward.total)
        same = got == expected or (exchange == "dispatch" and got[0] <= expected[0] and got[1] == expected[1])
        wrong += [] if same else [f"bytes of {exchange} {loss}: {got}, not {expected}"]
    return wrong


def properties() -> list[str]:
    """On one of two ranks: what does not hold, of two runs, of recomputation and of what travels."""
    bounds, block_size, top_k, rank = [0, 16, 16, 72, 96], 5, 4, dist.get_rank()
    mine = torch.tensor(zigzag(bounds, 2, rank))
    of_router = router_inputs(96, 2, 1)
    tensors = [x[mine].float() for x in (*pack_inputs(96, 4, 2), *of_router)]
    settings = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "block_size": block_size, "top_k": top_k}
    wrong = []
    for exchange in EXCHANGES[2]:
        attention = functools.partial(
            context_attention, cp_groups=ContextGroups(dist.group.WORLD), exchange=exchange, **settings
        )

        def recomputed(q, k, v, router, attention=attention):
            def inside(q, k, v, router_q, router_k):
                out, got = attention(q, k, v, router=Router(router_q, router_k, router.loss, router.loss_mask))
                return out, got.loss, got.entropy, got.tokens

            out, *sums = checkpoint(inside, q, k, v, router.q, router.k, use_reentrant=False)
            return out, RouterLoss(*sums)

        first, *others = (run(way, *tensors) for way in (attention, attention, recomputed))
        for other in others:
            pairs = zip([*first[:4], *first[4]], [*other[:4], *other[4]], strict=True)
            wrong += [] if all(torch.equal(a, b) for a, b in pairs) else [f"bits of {exchange}"]
        wrong += bytes_that_differ(exchange, attention, tensors)
    return wrong


def test_runs_and_recomputation_give_the_same_bits():
    assert run_ranks(2, properties) == [[], []]


def refusals() -> list[str]:
    q, k, v, _ = pack_inputs(32, 4, 2)
    router_q, router_k, _ = router_inputs(32, 2, 1)
    attention = functools.partial(context_attention, q, k, v, cp_groups=ContextGroups(dist.group.WORLD))
    sizes = {"block_size": 4, "top_k": 2}
    found = []
    for router, how in (
        (Router(router_q, router_k), {"block_size": None, "top_k": None}),
        (Router(router_q, router_k), {"backend": "reference", **sizes}),
        (Router(router_q[:, :1], router_k), sizes),
        (Router(router_q, router_k), {"selection": Selection("recent"), **sizes}),
        (Router(router_q, router_k, "dense"), {"exchange": "p2p", **sizes}),
    ):
        try:
            attention(router=router, **{"exchange": "a2a", **how})
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_cannot_be_is_refused_in_words():
    full, reference, heads, recent, dense = run_ranks(2, refusals)[0]
    assert "full attention has none" in full
    assert "backend 'reference' needs the whole pack on one rank" in reference
    assert "router.q has 1 heads" in heads
    assert "selector = 'recent'" in recent
    assert "router.loss = 'dense' with exchange 'p2p'" in dense and "use a2a" in dense
