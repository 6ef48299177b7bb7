"""The operator: backends against the reference, the reference against loops in plain Python, and properties."""

import itertools
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moba_megatron.ops import full_attention, moba_attention, select_blocks
from moba_megatron.ops.gathered import attend, attend_backward, attend_forward, select_past, summarize
from moba_megatron.ops.gathered.index import most_entries, token_ranges
from moba_megatron.ops.layout import block_layout
from moba_megatron.ops.reference import reference_attend, reference_select
from moba_megatron.ops.selectors import Recent

PACKS = {
    "one": ((0, 200), 16, 3),
    "tail": ((0, 203), 32, 3),
    "odd": ((0, 63, 163), 7, 4),
    "uneven": ((0, 5, 5, 68, 200, 201), 16, 3),
    "empty ends": ((0, 0, 100, 100), 8, 2),
    "long blocks": ((0, 300, 700), 150, 2),
    "wide tile": ((0, 1100), 500, 2),
}


def inputs(num_tokens, num_heads, num_kv_heads, size=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, heads, size) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def cu(bounds):
    return torch.tensor(bounds, dtype=torch.int32)


def results(attention, q, k, v, do):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, do.to(out.dtype))]


def plain_attend(q, k, v, ids, bounds, block_size):
    """What one would write in the inputs' own dtype: the yardstick of the tolerance."""
    repeat = q.shape[1] // k.shape[1]
    scores = torch.einsum("tnd,snd->nts", q, k.repeat_interleave(repeat, 1)) / math.sqrt(q.shape[2])
    layout = block_layout(q.shape[0], block_size, bounds)
    position = torch.arange(q.shape[0])
    own = (layout.pack_block_T[:, None] == layout.pack_block_T) & (position[:, None] >= position)
    chosen = (ids[..., None] == layout.block_T).any(2) & (layout.document_T[:, None] == layout.document_T)[:, None]
    scores = scores.masked_fill(~(own | chosen.transpose(0, 1)), -torch.inf)
    return torch.einsum("nts,snd->tnd", scores.softmax(-1), v.repeat_interleave(repeat, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (2, 2), (5, 1)])
@pytest.mark.parametrize("pack", PACKS)
def test_gathered_equals_reference(pack, num_heads, num_kv_heads, dtype):
    """Against fp64 with the same ids: at most twice the error of plain PyTorch in the same dtype, and rounding."""
    bounds, block_size, top_k = PACKS[pack]
    bounds = cu(bounds)
    q, k, v, do = inputs(int(bounds[-1]), num_heads, num_kv_heads, dtype=dtype)
    ids = select_blocks(q, k, bounds, block_size=block_size, top_k=top_k)[..., 1:]
    assert pack == "long blocks" or (ids >= 0).any()
    got = results(
        lambda *x: moba_attention(*x, bounds, block_size=block_size, top_k=top_k, backend="gathered"), q, k, v, do
    )
    wide = [x.double() for x in (q, k, v, do)]
    scale = 1 / math.sqrt(q.shape[2])
    want = results(lambda *x: reference_attend(*x, ids, bounds, block_size, scale)[0], *wide)
    plain = results(lambda *x: plain_attend(*x, ids, bounds, block_size), q, k, v, do)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, want, plain, strict=True):
        assert a.dtype == dtype and b.abs().max() > 0
        # fp64 has no wider oracle, so the reference's own rounding over some hundred terms counts as well.
        rounding = (16 if dtype == torch.float64 else 2) * torch.finfo(dtype).eps * float(b.abs().max())
        error, allowed = float((a - b).abs().max()), 2 * float((c - b).abs().max()) + rounding
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def test_reference_equals_plain_loops():
    """The definition once more, in Python floats: means, ranking, one softmax."""
    bounds, block_size, top_k = [0, 3, 14], 2, 3
    q, k, v, _ = inputs(14, 2, 1, size=3, dtype=torch.float64)
    expected = torch.zeros_like(q)
    for start, end in itertools.pairwise(bounds):
        for t, n in itertools.product(range(start, end), range(2)):
            own = (t - start) // block_size
            score = {}
            for block in range(own):
                keys = [k[start + block * block_size + i, 0].tolist() for i in range(block_size)]
                mean = [sum(column) / block_size for column in zip(*keys, strict=True)]
                score[block] = sum(a * b for a, b in zip(q[t, n].tolist(), mean, strict=True))
            chosen = sorted(score, key=lambda block: (-score[block], block))[: top_k - 1] + [own]
            seen = [s for s in range(start, t + 1) if (s - start) // block_size in chosen]
            weights = [math.exp(float(q[t, n] @ k[s, 0]) / math.sqrt(3)) for s in seen]
            expected[t, n] = sum(w * v[s, 0] for w, s in zip(weights, seen, strict=True)) / sum(weights)
    for backend in ("reference", "gathered"):
        got = moba_attention(q, k, v, cu(bounds), block_size=block_size, top_k=top_k, backend=backend)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    q, k, v, _ = inputs(11, 2, 1, size=2, dtype=torch.float64)
    layout = block_layout(11, 3, cu([0, 2, 11]))
    ids = select_past(q, summarize(k, layout), layout, 1)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, ids, layout, 0.7)[0], leaves)


def test_given_ids_any_order_and_holes():
    """Ids need no order, and -1 may stand anywhere; out and lse equal the reference's."""
    q, k, v, _ = inputs(64, 2, 1, dtype=torch.float64)
    layout = block_layout(64, 8)
    ids = select_past(q, summarize(k, layout), layout, 3)
    ids[:, :, 1].masked_fill_(torch.arange(64)[:, None] % 3 == 0, -1)
    for order in ([0, 1, 2], [2, 0, 1]):
        out, lse = attend(q, k, v, ids[..., order], layout, 0.25)
        want_out, want_lse = reference_attend(q, k, v, ids, None, 8, 0.25)
        torch.testing.assert_close(out, want_out)
        torch.testing.assert_close(lse, want_lse)


def test_gradients_with_the_global_lse_add_up():
    """With the whole attention's out and lse, gradients of all picks are those of some plus the others minus own."""
    q, k, v, do = inputs(64, 2, 1, dtype=torch.float64)
    layout = block_layout(64, 8)
    ids = select_past(q, summarize(k, layout), layout, 2)
    out, lse = attend_forward(q, k, v, ids, layout, 0.25)

    def given(which):
        return attend_backward(do, q, k, v, out, lse, which, layout, 0.25)

    for whole, first, second, own in zip(
        given(ids), given(ids[..., :1]), given(ids[..., 1:]), given(ids[..., :0]), strict=True
    ):
        torch.testing.assert_close(whole, first + second - own)


@pytest.mark.parametrize("backend", ["auto", "reference", "gathered"])
def test_large_top_k_is_full_attention(backend):
    q, k, v, do = inputs(100, 4, 2)
    for bounds in (None, cu([0, 37, 37, 100])):
        got = results(lambda *x, c=bounds: moba_attention(*x, c, block_size=16, top_k=7, backend=backend), q, k, v, do)
        want = results(lambda *x, c=bounds: full_attention(*x, c), q, k, v, do)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", "gathered"])
def test_top_1_is_block_local_attention(backend):
    q, k, v, _ = inputs(100, 4, 2)
    local = full_attention(q, k, v, cu([0, 16, 32, 37, 53, 69, 85, 100]))
    got = moba_attention(q, k, v, cu([0, 37, 100]), block_size=16, top_k=1, backend=backend)
    torch.testing.assert_close(got, local, rtol=1e-5, atol=1e-5)
    middle = moba_attention(q, k, v, cu([0, 37, 100]), block_size=16, top_k=2, backend=backend)
    full = full_attention(q, k, v, cu([0, 37, 100]))
    assert (middle - local).abs().max() > 1e-2 and (middle - full).abs().max() > 1e-2


def test_the_future_changes_nothing():
    q, k, v, _ = inputs(100, 2, 1)
    changed = [torch.cat([x[:61], x[61:] + 3]) for x in (q, k, v)]
    before, after = (moba_attention(*x, block_size=8, top_k=3, backend="gathered") for x in ((q, k, v), changed))
    # The same rows in the same products, but tiles of other sizes: equal to rounding, not to the bit.
    torch.testing.assert_close(before[:61], after[:61], rtol=1e-5, atol=1e-5)
    assert (before[61:] - after[61:]).abs().max() > 0.1


def test_packed_equals_separate():
    bounds = [0, 33, 33, 100, 207]
    q, k, v, do = inputs(207, 4, 2)
    packed = results(lambda *x: moba_attention(*x, cu(bounds), block_size=16, top_k=3, backend="gathered"), q, k, v, do)
    parts = []
    for start, end in ((0, 33), (33, 100), (100, 207)):
        cut = [x[start:end] for x in (q, k, v, do)]
        parts.append(results(lambda *x: moba_attention(*x, block_size=16, top_k=3, backend="gathered"), *cut))
    for a, b in zip(packed, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(a, torch.cat(b), rtol=1e-5, atol=1e-5)


def test_same_bits_every_time():
    q, k, v, do = inputs(700, 4, 2, dtype=torch.bfloat16)
    runs = [
        results(lambda *x: moba_attention(*x, block_size=64, top_k=3, backend="gathered"), q, k, v, do)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_gradient_through_selection_and_lse():
    q, k, v, _ = inputs(40, 2, 1)
    layout = block_layout(40, 4)
    summaries = summarize(k.requires_grad_(), layout)
    ids = select_past(q.requires_grad_(), summaries, layout, 2)
    assert not summaries.requires_grad and not attend(q, k, v, ids, layout, 1.0)[1].requires_grad


def test_sliding_window_is_a_selector():
    q, k, v, _ = inputs(64, 2, 1, dtype=torch.float64)
    layout = block_layout(64, 8)
    ids = select_past(q, summarize(k, layout), layout, 2, Recent())
    out, _ = attend(q, k, v, ids, layout, 0.25)
    position = torch.arange(64)
    window = (position[:, None] >= position) & (position // 8 >= position[:, None] // 8 - 2)
    scores = torch.einsum("tnd,snd->nts", q, k.expand(-1, 2, -1)) * 0.25
    want = torch.einsum("nts,snd->tnd", scores.masked_fill(~window, -torch.inf).softmax(-1), v.expand(-1, 2, -1))
    torch.testing.assert_close(out, want)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation's result held in memory of its own."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_memory_is_sparse():
    """No tensor of tokens x blocks x heads, and none larger than a few times q."""
    length, heads, block_size = 16384, 4, 16
    q, k, v, do = inputs(length, heads, 2, size=8)
    with LargestTensor() as largest:
        results(lambda *x: moba_attention(*x, block_size=block_size, top_k=3, backend="gathered"), q, k, v, do)
    assert largest.elements <= 4 * q.numel() < length * heads * (length // block_size) / 8


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that are still alive, and the most there were."""

    def __init__(self, *existing):
        super().__init__()
        self.live, self.peak = 0, 0
        self.known = {tensor.untyped_storage()._cdata for tensor in existing}

    def _forget(self, key, size):
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "top_k"), [(1, 1, 32), (4, 2, 3)])
def test_memory_does_not_grow_with_top_k(monkeypatch, num_heads, num_kv_heads, top_k):
    """Beyond inputs, output and gradients at most 8 times q, however few heads and however many blocks."""
    # Tiles have a constant size, which at this short length would drown what grows with the length.
    monkeypatch.setattr("moba_megatron.ops.gathered.kv_heads.SCORES_PER_THREAD", 2**14)
    monkeypatch.setattr("moba_megatron.ops.gathered.combine.TOKENS_AT_ONCE", 512)
    monkeypatch.setattr("moba_megatron.ops.gathered.index.FEWEST_ENTRIES", 1)
    q, k, v, do = inputs(4096, num_heads, num_kv_heads, size=64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with LiveBytes(*leaves, do) as memory:
        out = moba_attention(*leaves, block_size=32, top_k=top_k, backend="gathered")
        gradients = torch.autograd.grad(out, leaves, do)
    returned = sum(x.nbytes for x in (out, *gradients))
    assert returned < memory.peak <= returned + 8 * q.nbytes


def test_token_ranges_do_not_show(monkeypatch):
    """Many past blocks and few heads are cut by tokens: the same attention, across documents and odd lengths."""
    q, k, v, do = inputs(203, 2, 1, dtype=torch.float64)
    bounds, block_size, top_k = cu([0, 37, 203]), 8, 20
    monkeypatch.setattr("moba_megatron.ops.gathered.index.FEWEST_ENTRIES", 1)
    assert len(list(token_ranges(203, 1, top_k - 1, most_entries(q, 2, workspace_bytes=None)))) == 5
    ids = select_blocks(q, k, bounds, block_size=block_size, top_k=top_k)[..., 1:]
    got = results(lambda *x: moba_attention(*x, bounds, block_size=block_size, top_k=top_k), q, k, v, do)
    want = results(lambda *x: reference_attend(*x, ids, bounds, block_size, 0.25)[0], q, k, v, do)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kv_blocks_in_shared_tiles_and_in_their_own(monkeypatch, dtype):
    """Short kv blocks that share tiles, in whatever batches, compute what a tile for each of them does."""
    q, k, v, do = inputs(203, 4, 2, dtype=dtype)
    bounds = cu([0, 37, 60, 203])

    def run(scores: int, rows: int):
        monkeypatch.setattr("moba_megatron.ops.gathered.kv_heads.SCORES_PER_THREAD", scores)
        monkeypatch.setattr("moba_megatron.ops.gathered.index.ROWS_OF_BATCH", rows)
        monkeypatch.setattr("moba_megatron.ops.gathered.past.SMALL_KV_BLOCKS", 2)
        return results(lambda *x: moba_attention(*x, bounds, block_size=8, top_k=4, backend="gathered"), q, k, v, do)

    own = run(1, 64)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for scores, rows in ((2**18, 64), (2**18, 5), (2**10, 16)):
        for got, want in zip(run(scores, rows), own, strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_selection_order_does_not_need_the_reference():
    q, k, v, _ = inputs(100, 2, 1)
    ids = reference_select(q, k, None, 8, 2)
    got = moba_attention(q, k, v, block_size=8, top_k=3, backend="gathered")
    torch.testing.assert_close(got, reference_attend(q, k, v, ids, None, 8, 0.25)[0], rtol=1e-5, atol=1e-5)


class CountedOperators(TorchDispatchMode):
    """Counts the operators that PyTorch runs, views aside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not operator.is_view
        return operator(*args, **(kwargs or {}))


def test_small_blocks_take_few_operators():
    """At this size calls cost as much as the products in them; the heads of all key heads share them."""
    q, k, v, do = inputs(2048, 9, 3, size=64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with CountedOperators() as operators:
            torch.autograd.grad(moba_attention(*leaves, block_size=64, top_k=8, backend="gathered"), leaves, do)
    finally:
        torch.set_num_threads(threads)
    assert 1000 < operators.count <= 3500
