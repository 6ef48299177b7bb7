"""What must hold beside the numbers: the same choices, the same bits, no leaks, counted bytes, a shared load."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from parallel.examples import (
    HEAD_SIZE,
    groups_for,
    oracle,
    pack_inputs,
    run_shard,
    smallest_margin,
    zigzag,
)

from moba_megatron.ops import moba_attention, select_blocks
from moba_megatron.ops.gathered.routing import select_past
from moba_megatron.ops.reference import reference_select
from moba_megatron.parallel import copies
from moba_megatron.parallel.attention import ContextGroups, context_attention
from moba_megatron.parallel.context_plan import plan_context
from moba_megatron.parallel.exchange_kind import RankSizes
from moba_megatron.parallel.exchanges import EXCHANGES, traffic
from moba_megatron.parallel.summaries import SummaryExchange, summary_bytes
from moba_megatron.parallel.wire import Wire, observe

BOUNDS = [0, 16, 72, 96, 160]
HEADS, KV_HEADS = 8, 4
NAMES = tuple(EXCHANGES)


def on_four(function):
    """The results of a function on each of four ranks; processes start once for each function."""
    return run_ranks(4, function, timeout=200)


def attention(exchange, bounds, block_size, top_k, cp_groups):
    cu = torch.tensor(bounds, dtype=torch.int32)
    settings = {"cp_groups": cp_groups, "exchange": exchange, "block_size": block_size, "top_k": top_k}
    return functools.partial(context_attention, cu_seqlens=cu, **settings)


def choices(tensors, bounds, block_size, top_k):
    """This rank's chosen past blocks, and its positions."""
    size, rank = dist.get_world_size(), dist.get_rank()
    positions = torch.tensor(zigzag(bounds, size, rank))
    q, k = (x[positions] for x in tensors[:2])
    plan = plan_context(torch.tensor(bounds), block_size, (1, size), rank, torch.device("cpu"))
    summaries = SummaryExchange(plan, Wire(dist.group.WORLD), k).wait()
    return select_past(q, summaries, plan.queries, top_k - 1), positions


def test_choices_are_those_of_one_rank():
    def compare():
        for block_size, top_k in ((4, 3), (5, 4), (24, 2)):
            tensors = pack_inputs(BOUNDS[-1], HEADS, KV_HEADS, dtype=torch.float32)
            assert smallest_margin(*(x.double() for x in tensors[:2]), BOUNDS, block_size, top_k) > 1e-5
            ids, positions = choices(tensors, BOUNDS, block_size, top_k)
            whole = reference_select(*tensors[:2], torch.tensor(BOUNDS), block_size, top_k - 1)
            assert torch.equal(ids, whole[positions])

    on_four(compare)


def test_ties_go_to_the_lower_block_on_every_rank():
    """Constant keys and one document twice: all scores are exact, and many are equal."""

    def compare():
        bounds = [0, 64, 128]
        generator = torch.Generator().manual_seed(0)
        q = torch.randint(-2, 3, (128, 4, HEAD_SIZE), generator=generator).float()
        for k in (torch.ones(128, 2, HEAD_SIZE), torch.randint(-1, 2, (64, 2, HEAD_SIZE), generator=generator).float()):
            k = k if k.shape[0] == 128 else torch.cat([k, k])
            for block_size, top_k in ((8, 3), (16, 4), (2, 5)):
                ids, positions = choices((q, k), bounds, block_size, top_k)
                whole = select_blocks(q, k, torch.tensor(bounds, dtype=torch.int32), block_size=block_size, top_k=top_k)
                assert torch.equal(ids, whole[positions, :, 1:])

    on_four(compare)


def test_a2a_equals_one_rank_bit_for_bit():
    def compare():
        size, rank, cp_groups = dist.get_world_size(), dist.get_rank(), groups_for("a2a")
        cu = torch.tensor(BOUNDS, dtype=torch.int32)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            # The last covers every document: full attention, under auto.
            for block_size, top_k in ((7, 3), (2, 16), (16, 2), (16, 100)):
                tensors = pack_inputs(BOUNDS[-1], HEADS, KV_HEADS, dtype=dtype)
                ours, positions = run_shard(
                    attention("a2a", BOUNDS, block_size, top_k, cp_groups), tensors, BOUNDS, size, rank
                )
                leaves = [x.clone().requires_grad_() for x in tensors[:3]]
                out = moba_attention(*leaves, cu, block_size=block_size, top_k=top_k)
                one = [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]
                assert all(torch.equal(a, b[positions]) for a, b in zip(ours, one, strict=True))

    on_four(compare)


def test_two_runs_give_the_same_bits():
    def compare():
        size, rank = dist.get_world_size(), dist.get_rank()
        tensors = pack_inputs(BOUNDS[-1], HEADS, KV_HEADS, dtype=torch.float32)
        for name in NAMES:
            call = attention(name, BOUNDS, 5, 3, groups_for(name))
            first, second = (run_shard(call, tensors, BOUNDS, size, rank)[0] for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name

    on_four(compare)


def test_nothing_leaks_from_the_future_or_from_other_documents():
    def compare():
        size, rank = dist.get_world_size(), dist.get_rank()
        tensors = pack_inputs(BOUNDS[-1], HEADS, KV_HEADS)
        changed = [x.clone() for x in tensors]
        for x in changed[1:3]:
            x[50:72] += 7.0  # the end of the second document
            x[72:96] -= 7.0  # the third
        same = torch.ones(BOUNDS[-1], dtype=torch.bool)
        same[50:96] = False
        for name in NAMES:
            call = attention(name, BOUNDS, 5, 3, groups_for(name))
            before, positions = run_shard(call, tensors, BOUNDS, size, rank)
            after, _ = run_shard(call, changed, BOUNDS, size, rank)
            kept = same[positions]
            # Other rows in a tile may change how it is rounded; a leak of a change by 7 would not be that small.
            torch.testing.assert_close(before[0][kept], after[0][kept], rtol=0, atol=1e-13)
            assert (before[0] - after[0])[~kept].abs().max() > 1e-3 or kept.all(), name

    on_four(compare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_close_to_the_definition(dtype):
    """Every block is chosen, so that no near-tie decides: what is left is rounding."""
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 0.04, torch.float16: 6e-3}[dtype]

    def compare():
        size, rank = dist.get_world_size(), dist.get_rank()
        tensors = pack_inputs(BOUNDS[-1], HEADS, KV_HEADS, dtype=dtype)
        wide, _ = oracle(*(x.double() for x in tensors), BOUNDS, 8, 100)
        for name in NAMES:
            ours, positions = run_shard(attention(name, BOUNDS, 8, 100, groups_for(name)), tensors, BOUNDS, size, rank)
            for mine, whole in zip(ours, wide, strict=True):
                assert mine.dtype == dtype
                assert (mine.double() - whole[positions]).abs().max() <= tolerance * whole.abs().max(), name

    on_four(compare)


def remote_owners(ids, bounds, block_size, size, rank):
    """For each rank, rows of `rank` that need keys of it: written with sets of positions."""
    owner = {p: r for r in range(size) for p in zigzag(bounds, size, r)}
    starts = [start for start, end in itertools.pairwise(bounds) for _ in range(end - start)]
    visits = [0] * size
    for row, position in enumerate(zigzag(bounds, size, rank)):
        start = starts[position]
        own = (position - start) // block_size
        before = {owner[p] for p in range(start + own * block_size, position)}
        for head_ids in ids[row].tolist():
            first = [start + block * block_size for block in head_ids if block >= 0]
            owners = before | {owner[p] for f in first for p in range(f, f + block_size)}
            for other in owners - {rank}:
                visits[other] += 1
    return visits


def test_bytes_are_those_of_the_formulas():
    def compare():
        copies.FAIR = float("inf")  # in this rank only: no copies, which the formulas do not hold
        size, rank = dist.get_world_size(), dist.get_rank()
        block_size, top_k = 5, 3
        tensors = pack_inputs(BOUNDS[-1], HEADS, KV_HEADS, dtype=torch.float32)
        sizes = RankSizes(BOUNDS[-1] // size, HEADS, KV_HEADS, HEAD_SIZE, 4, block_size, top_k)
        plan = plan_context(torch.tensor(BOUNDS), block_size, (1, size), rank, torch.device("cpu"))
        positions = torch.tensor(zigzag(BOUNDS, size, rank))
        for name in NAMES:
            cp_groups = groups_for(name)
            leaves = [x[positions].clone().requires_grad_() for x in tensors[:3]]
            with observe() as forward:
                out = attention(name, BOUNDS, block_size, top_k, cp_groups)(*leaves)
            with observe() as backward:
                out.backward(tensors[3][positions])
            summaries = forward.received.pop("summaries", 0)
            if name in ("p2p", "all_gather", "dispatch"):
                assert summaries == summary_bytes(plan, KV_HEADS, HEAD_SIZE, torch.float32)
            if name != "dispatch":
                levels = cp_groups.levels(EXCHANGES[name]) if EXCHANGES[name].two_levels else None
                expected = traffic(name, sizes, size, levels)
                assert (forward.total, backward.total) == (expected.forward, expected.backward), name
                continue
            ids = choices(tensors, BOUNDS, block_size, top_k)[0]
            visits = remote_owners(ids, BOUNDS, block_size, size, rank)
            everyone: list = [None] * size
            dist.all_gather_object(everyone, visits)
            guests = sum(theirs[rank] for theirs in everyone)
            assert forward.loads[0].copied_blocks == 0 and forward.loads[0].guests == guests
            row = HEAD_SIZE * 4
            assert forward.received["queries"] == guests * row
            assert forward.received["outputs"] == sum(visits) * (row + 4)
            assert backward.received["queries"] == guests * (2 * row + 8)
            assert backward.received["outputs"] == sum(visits) * row
            assert forward.received["keys"] == backward.received["gradients"] == 0
            # Over all ranks the formula with the true mean of E holds, but for the picked ids, which it bounds.
            rows = sum(sum(theirs) for theirs in everyone)
            mean = rows / (BOUNDS[-1] * HEADS)
            formula = traffic(name, sizes, size, remote_owners=mean).forward * size
            assert formula == pytest.approx(rows * (2 * row + 4 + 4 * (top_k - 1)))

    on_four(compare)


def test_hot_blocks_are_copied_and_nothing_changes():
    """All queries prefer the first block of the second document, whose owner would be drowned."""

    def compare():
        size, rank = dist.get_world_size(), dist.get_rank()
        bounds, block_size, top_k = [0, 32, 160], 4, 3
        q, k, v, do = pack_inputs(bounds[-1], HEADS, KV_HEADS)
        q = q.abs()
        k[32:36] = 3.0
        tensors = (q, k, v, do)
        expected, ids = oracle(*tensors, bounds, block_size, top_k)
        assert (ids[40:] == 0).any(dim=-1).all(), "every query chose the first block"
        call = attention("dispatch", bounds, block_size, top_k, groups_for("dispatch"))
        with observe() as seen:
            ours, positions = run_shard(call, tensors, bounds, size, rank)
        for mine, whole in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, whole[positions], rtol=0, atol=1e-12)
        (load,) = seen.loads
        assert load.copied_blocks >= 1
        assert load.most > 2 * load.mean and load.most_after <= 1.25 * load.mean
        return load.copied_blocks, seen.received["keys"], seen.received["gradients"]

    results = on_four(compare)
    # To three other ranks, 4 tokens of keys and values of 4 heads in fp64 a block, twice; their gradients home once.
    one_way = results[0][0] * 3 * 4 * 2 * KV_HEADS * HEAD_SIZE * 8
    assert [sum(column) for column in zip(*results, strict=True)][1:] == [2 * one_way, one_way]


def test_groups_need_not_be_neighbours():
    """Two context-parallel pairs of four ranks, {0, 2} and {1, 3}, on different data at the same time."""

    def compare():
        rank = dist.get_rank()
        pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        cp_groups = ContextGroups(pairs[rank % 2])
        tensors = pack_inputs(BOUNDS[-1], HEADS, KV_HEADS, seed=rank % 2)
        expected, _ = oracle(*tensors, BOUNDS, 5, 3)
        for name in ("p2p", "all_gather", "a2a", "dispatch"):
            ours, positions = run_shard(attention(name, BOUNDS, 5, 3, cp_groups), tensors, BOUNDS, 2, rank // 2)
            for mine, whole in zip(ours, expected, strict=True):
                torch.testing.assert_close(mine, whole[positions], rtol=0, atol=1e-12)

    on_four(compare)


def test_what_does_not_fit_raises_on_every_rank():
    def messages():
        cp_groups = groups_for("a2a")
        q, k, v, _ = (x[:40] for x in pack_inputs(40, 8, 2))
        found = []
        for changes in (
            {"exchange": "a2a"},
            {"exchange": "ring"},
            {"exchange": "a2a+p2p"},
            {"cu_seqlens": torch.tensor([0, 12, 160])},
            {"cu_seqlens": torch.tensor([0, 40])},
            {"top_k": None},
            {"backend": "reference"},
        ):
            settings = {"cp_groups": cp_groups, "exchange": "p2p", "block_size": 8, "top_k": 2, **changes}
            with pytest.raises(ValueError) as error:
                context_attention(q, k, v, **settings)
            found.append(str(error.value))
        return found

    expected = [
        "4 context-parallel ranks do not divide 8 query heads and 2 key heads",
        "choose one of p2p, all_gather, a2a, a2a+p2p, dispatch",
        "needs the groups `inner` and `outer`",
        "document 0 of the pack has 12 tokens, not a multiple of 2 x context-parallel size = 8: pad it to 16",
        "4 ranks x 40 tokens = 160",
        "give both (MoBA) or none",
        "'reference' needs the whole pack on one rank",
    ]
    for found in on_four(messages):
        assert [want in have for want, have in zip(expected, found, strict=True)] == [True] * len(expected), found
