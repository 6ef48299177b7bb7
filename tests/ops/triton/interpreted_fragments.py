"""Attention over fragments of the keys in Triton's interpreter, compared with the portable backend."""

import dataclasses

import pytest
import torch
from kernel_examples import cu, inputs

from moba_megatron.ops import gathered
from moba_megatron.ops import triton as kernels
from moba_megatron.ops.fragments import Fragment, Keys
from moba_megatron.ops.reference import reference_select
from moba_megatron.parallel.context_plan import ContextPlan

SCALE = 0.25
BOUNDS = torch.tensor([0, 8, 8, 60, 120])


def accumulated(ops, tasks, q, dtype):
    """out and lse after attending (keys, ids, fragment) one after the other."""
    out, lse = torch.zeros(q.shape, dtype=dtype), torch.full(q.shape[:2], -torch.inf)
    for keys, ids, fragment in tasks:
        ops.accumulate(q, keys, ids, fragment, SCALE, out, lse)
    return out, lse


def gradients(ops, tasks, q, do, out, lse):
    """dq, and dk and dv of each task; their memory is filled with NaN before."""
    dq, partials = torch.zeros(q.shape), []
    for keys, ids, fragment in tasks:
        dk, dv = torch.full((2, *keys.k.shape), torch.nan, dtype=q.dtype)
        delta = ops.output_delta(do, out)
        ops.accumulate_backward(do, q, keys, ids, fragment, SCALE, out, lse, delta, dq, dk, dv)
        partials += [dk, dv]
    return [dq, *partials]


def tasks_of(rank, block_size, num_past, dtype=torch.float32):
    """A rank's part of a pack over two ranks: its queries, and the keys of both as fragments.

    Blocks straddle the ranks, so that kv blocks of one block overlap and some are of the query's own block.
    """
    total = int(BOUNDS[-1])
    q, k, v, do = inputs(total, 4, 2, dtype=dtype)
    plan = ContextPlan(BOUNDS, block_size, (1, 2), rank, torch.device("cpu"))
    ids = reference_select(q, k, cu(BOUNDS.tolist()), plan.layout.block_size, num_past)
    mine = plan.here.positions
    tasks = []
    for source in (rank, 1 - rank):
        rows = plan.shard(source).positions
        tasks.append((Keys(k[rows], v[rows], 2), ids[mine], plan.fragment(source)))
    return q[mine].contiguous(), do[mine].contiguous(), tasks


@pytest.mark.parametrize("block_size", [13, None])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_two(rank, block_size):
    """MoBA with blocks that straddle ranks, and full attention (one block per document, nothing chosen)."""
    q, do, tasks = tasks_of(rank, block_size, 2 if block_size else 0)
    assert any(fragment.own_kv_block_T is not None for _, _, fragment in tasks)
    out, lse = accumulated(kernels, tasks, q, torch.float32)
    want_out, want_lse = accumulated(gathered, tasks, q, torch.float32)
    torch.testing.assert_close(out, want_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    got = gradients(kernels, tasks, q, do, want_out, want_lse)
    want = gradients(gathered, tasks, q, do, want_out, want_lse)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_slots_of_blocks_at_hand(rank):
    """A rank's keys hold fewer blocks of a document than a query chooses: its row has a slot for each of them, and not
    for each id. The same bits."""
    q, do, tasks = tasks_of(rank, 8, 7)
    every = [(keys, ids, dataclasses.replace(fragment, most_held=None)) for keys, ids, fragment in tasks]
    for (_, ids, fragment), (_, _, other) in zip(tasks, every, strict=True):
        form = kernels.on_device(fragment, q.device)
        assert form.gathers(7) and form.num_slots(7) < kernels.on_device(other, q.device).num_slots(7)
        held = fragment.chosen_kv_blocks(ids, slice(None), slice(None))[..., :7] >= 0
        assert int(held.sum(dim=2).max()) == fragment.most_held
    out, lse = accumulated(kernels, tasks, q, torch.float32)
    want_out, want_lse = accumulated(kernels, every, q, torch.float32)
    assert torch.equal(out, want_out) and torch.equal(lse, want_lse)
    torch.testing.assert_close(out, accumulated(gathered, tasks, q, torch.float32)[0], rtol=1e-5, atol=1e-5)
    got, want = (gradients(kernels, these, q, do, out, lse) for these in (tasks, every))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_accumulators_of_both_precisions():
    """bf16 inputs into an fp32 accumulator and into a bf16 one."""
    q, _, tasks = tasks_of(1, 13, 2, torch.bfloat16)
    want = accumulated(
        gathered, [(Keys(k.k.float(), k.v.float(), 2), i, f) for k, i, f in tasks], q.float(), torch.float32
    )
    for dtype, atol in ((torch.float32, 2e-2), (torch.bfloat16, 4e-2)):
        out, lse = accumulated(kernels, tasks, q, dtype)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), want[0], rtol=0, atol=atol)
        torch.testing.assert_close(lse, want[1], rtol=1e-5, atol=1e-5)


def test_device_form_is_made_once():
    """It stays with its fragment; what is made from the fragment by a change has its own."""
    _, _, tasks = tasks_of(0, 13, 2)
    fragment, device = tasks[0][2], torch.device("cpu")
    form = kernels.on_device(fragment, device)
    assert kernels.on_device(fragment, device) is form and kernels.on_device(form, device) is form
    changed = kernels.on_device(dataclasses.replace(fragment, causal_spans=[]), device)
    assert changed.causal_spans.count == 0 < form.causal_spans.count


def test_kv_block_numbers_as_ids_and_some_heads():
    """Guests of another rank: ids are numbers of kv blocks, no causal spans, and keys of one kv head of several."""
    q, k, v, _ = inputs(40, 4, 2)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, 3, (40, 4, 1), generator=generator, dtype=torch.int32)
    fragment = Fragment([(0, 11), (11, 12), (12, 40)], [])
    for first in (0, 1):
        keys = Keys(k[:, first : first + 1], v[:, first : first + 1], 2, first)
        got, want = (accumulated(ops, [(keys, ids, fragment)], q, torch.float32) for ops in (kernels, gathered))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        rows = got[1] == -torch.inf
        assert rows.any() and (got[0][rows] == 0).all() and torch.equal(rows, want[1] == -torch.inf)


def test_nothing_to_attend():
    """No kv blocks, no entries, no tokens: accumulators stay, gradients are zero."""
    q, k, v, do = inputs(12, 2, 1)
    keys, none = Keys(k, v, 2), torch.full((12, 2, 1), -1, dtype=torch.int32)
    for fragment in (Fragment([], []), Fragment([(0, 12)], [])):
        out, lse = accumulated(kernels, [(keys, none, fragment)], q, torch.float32)
        assert (out == 0).all() and (lse == -torch.inf).all()
        found = gradients(kernels, [(keys, none, fragment)], q, do, out, lse.zero_())
        assert all((x == 0).all() for x in found)


def test_no_queries():
    q, k, v, _ = inputs(12, 2, 1)
    keys, none = Keys(k, v, 2), torch.empty(0, 2, 1, dtype=torch.int32)
    tasks = [(keys, none, Fragment([(0, 12)], []))]
    out, lse = accumulated(kernels, tasks, q[:0], torch.float32)
    assert all((x == 0).all() for x in gradients(kernels, tasks, q[:0], q[:0], out, lse))
