"""A router's choice and its losses: backends against the definition, gradients against finite differences."""

import itertools

import pytest
import torch

from moba_megatron.ops import Router, RouterLoss, moba_attention, router_loss, select_blocks

BOUNDS = torch.tensor([0, 5, 5, 68, 200, 201], dtype=torch.int32)
HEADS = {"shared key": (4, 2, 2, 1), "key heads": (4, 2, 2, 2), "query heads": (4, 2, 4, 2), "one key": (4, 2, 4, 1)}


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def attention_inputs(num_tokens, num_heads, num_kv_heads, size=8, dtype=torch.float64):
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return [draw(num_tokens, h, size, dtype=dtype, seed=seed) for seed, h in enumerate(heads)]


def router_of(num_tokens, num_heads, num_key_heads, size=6, dtype=torch.float64, **how):
    """A router whose choices differ from those of q and k."""
    q, k = (draw(num_tokens, h, size, dtype=dtype, seed=seed) for seed, h in ((7, num_heads), (8, num_key_heads)))
    return Router(q.requires_grad_(), k.requires_grad_(), **how)


@pytest.mark.parametrize("backend", ["reference", "gathered"])
def test_a_copy_of_q_and_k_is_moba(backend):
    q, k, v = attention_inputs(201, 4, 2, dtype=torch.float32)
    how = {"block_size": 16, "top_k": 3}
    router = Router(q, k)
    want = moba_attention(q, k, v, BOUNDS, backend=backend, **how)
    assert torch.equal(moba_attention(q, k, v, BOUNDS, backend=backend, router=router, **how), want)
    assert torch.equal(select_blocks(q, k, BOUNDS, router=router, **how), select_blocks(q, k, BOUNDS, **how))
    learning = Router(q, k, loss="sparse")
    out, _ = moba_attention(q, k, v, BOUNDS, backend=backend, router=learning, **how)
    assert torch.equal(out, want)
    shared = {"share_selection": "max", **how}
    assert torch.equal(
        moba_attention(q, k, v, BOUNDS, backend=backend, router=router, **shared),
        moba_attention(q, k, v, BOUNDS, backend=backend, **shared),
    )


def test_choice_in_plain_loops():
    """One choice per key head by a shared key: means, ranking."""
    q, k, _ = attention_inputs(40, 4, 2)
    router = router_of(40, 2, 1)
    got = select_blocks(q, k, torch.tensor([0, 3, 40]), block_size=4, top_k=3, router=router)
    other = select_blocks(q, k, torch.tensor([0, 3, 40]), block_size=4, top_k=3)
    assert not torch.equal(got, other)
    for start, end in ((0, 3), (3, 40)):
        for t, n in itertools.product(range(start, end), range(4)):
            own = (t - start) // 4
            means = [router.k[start + 4 * b : start + 4 * b + 4, 0].mean(dim=0) for b in range(own)]
            scores = [(router.q[t, n // 2] @ mean).item() for mean in means]
            best = sorted(range(own), key=lambda b: -scores[b])[:2]
            assert got[t, n].tolist() == [own, *best, *[-1] * (2 - len(best))]


@pytest.mark.parametrize("selector", [{}, {"selector": "threshold", "threshold": 0.7}])
@pytest.mark.parametrize("loss", ["sparse", "dense"])
@pytest.mark.parametrize("heads", HEADS)
def test_gathered_equals_reference(heads, loss, selector):
    num_heads, num_kv_heads, router_heads, key_heads = HEADS[heads]
    mask = draw(201, seed=3) > -0.5
    q, k, v = attention_inputs(201, num_heads, num_kv_heads)
    found = {}
    for backend in ("reference", "gathered"):
        router = router_of(201, router_heads, key_heads, loss=loss, loss_mask=mask)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, of_router = moba_attention(
            *leaves, BOUNDS, block_size=16, top_k=4, backend=backend, router=router, **selector
        )
        assert isinstance(of_router, RouterLoss) and float(of_router.tokens) == mask.sum()
        gradients = torch.autograd.grad(of_router.loss * 3, (router.q, router.k), retain_graph=True)
        assert all(x is None for x in torch.autograd.grad(of_router.loss, leaves, allow_unused=True, retain_graph=True))
        of_out = torch.autograd.grad(out.sum(), [*leaves, router.q, router.k], allow_unused=True)
        assert of_out[3:] == (None, None)
        found[backend] = [out, of_router.loss, of_router.entropy, *gradients, *of_out[:3]]
        assert all(x.abs().max() > 0 for x in found[backend])
    for got, want in zip(found["gathered"], found["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_loss_in_plain_loops():
    """The definition once more: masses of chosen blocks by one softmax, divergence of the router's shares from them."""
    q, k, v = attention_inputs(30, 4, 2)
    router = router_of(30, 2, 1, loss="sparse")
    how = {"block_size": 4, "top_k": 4}
    _, got = moba_attention(q, k, v, router=router, **how)
    ids = select_blocks(q, k, router=router, **how)
    total = 0.0
    for t, g in itertools.product(range(30), range(2)):
        own, chosen = t // 4, [b for b in ids[t, 2 * g].tolist()[1:] if b >= 0]
        if len(chosen) < 2:
            continue
        mass = torch.zeros(len(chosen), dtype=torch.float64)
        for n in (2 * g, 2 * g + 1):
            seen = {b: [*range(4 * b, min(4 * b + 4, t + 1))] for b in [*chosen, own]}
            keys = [s for rows in seen.values() for s in rows]
            weights = dict(zip(keys, (k[keys, g] @ q[t, n] / 8**0.5).softmax(0).tolist(), strict=True))
            mass += torch.tensor([sum(weights[s] for s in seen[b]) for b in chosen], dtype=torch.float64) / 2
        p = mass / mass.sum()
        means = torch.stack([router.k[4 * b : 4 * b + 4, 0].mean(dim=0) for b in chosen])
        log_pi = (means @ router.q[t, g] / 6**0.5).log_softmax(0)
        total += (p * (p.log() - log_pi)).sum().item() / 2
    assert got.loss.item() == pytest.approx(total, rel=1e-10) and total > 1
    assert float(got.tokens) == 30


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("loss", ["sparse", "dense"])
def test_gradients_by_finite_differences(loss, heads):
    num_heads, num_kv_heads, router_heads, key_heads = HEADS[heads]
    q, k, v = attention_inputs(23, num_heads, num_kv_heads, size=4)
    bounds = torch.tensor([0, 6, 23])
    mask = (torch.arange(23) % 3 > 0).double()
    drawn = router_of(23, router_heads, key_heads, size=4)
    chosen = select_blocks(q, k, bounds, block_size=4, top_k=4, router=drawn)

    def loss_of(router_q, router_k):
        router = Router(router_q, router_k, loss, mask)
        # Finite differences must not change the choice.
        assert torch.equal(select_blocks(q, k, bounds, block_size=4, top_k=4, router=router), chosen)
        return moba_attention(q, k, v, bounds, block_size=4, top_k=4, router=router)[1].loss

    assert torch.autograd.gradcheck(loss_of, (drawn.q, drawn.k), eps=1e-5, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "gathered", "auto"])
@pytest.mark.parametrize("heads", HEADS)
def test_with_all_blocks_chosen_sparse_equals_dense(heads, backend):
    num_heads, num_kv_heads, router_heads, key_heads = HEADS[heads]
    q, k, v = attention_inputs(201, num_heads, num_kv_heads)
    found = []
    for loss in ("sparse", "dense"):
        router = router_of(201, router_heads, key_heads, loss=loss, loss_mask=torch.arange(201) % 3 > 0)
        out, got = moba_attention(q, k, v, BOUNDS, block_size=16, top_k=9, backend=backend, router=router)
        found.append([out, got.loss, got.entropy, got.tokens, *torch.autograd.grad(got.loss, (router.q, router.k))])
    for sparse, dense in zip(*found, strict=True):
        assert dense.abs().max() > 0
        torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)


def test_dense_loss_does_not_depend_on_the_choice_or_on_tiles(monkeypatch):
    q, k, v = attention_inputs(201, 4, 2)
    found = []
    for top_k, scores in ((2, 2**20), (3, 500), (9, 2**20)):
        monkeypatch.setattr("moba_megatron.ops.dense_loss.SCORES_ON_CPU", scores)
        router = router_of(201, 2, 1, loss="dense")
        _, got = moba_attention(q, k, v, BOUNDS, block_size=16, top_k=top_k, router=router)
        found.append([got.loss, got.entropy, *torch.autograd.grad(got.loss, (router.q, router.k))])
    for one, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_sums_by_row_are_those_of_a_loop(monkeypatch):
    """Rows that nobody names, one that most name, pieces of one entry and of many."""
    rows = torch.tensor([[[5, 2], [2, 0]], [[2, 5], [5, 2]], [[2, 0], [2, 5]]])
    q, weights = draw(6, 3), draw(3, 2, 2, seed=1)
    want = torch.zeros(8, 3, dtype=q.dtype)
    for place, (row, weight) in enumerate(zip(rows.flatten().tolist(), weights.flatten(), strict=True)):
        want[row] += weight * q[place // 2]
    for piece in (1, 2, 3, 512):
        monkeypatch.setattr(router_loss, "PIECE", piece)
        torch.testing.assert_close(router_loss._sums_by_row(q, rows, weights, 8), want, rtol=1e-12, atol=1e-12)


def test_perfect_shares_have_no_loss():
    """Where all scores are 0 and all keys are equal, shares are equal on both sides."""
    q, k, v = torch.zeros(64, 2, 4), torch.zeros(64, 1, 4), draw(64, 1, 4, dtype=torch.float32)
    router = Router(torch.zeros(64, 1, 2), torch.zeros(64, 1, 2), "sparse")
    _, got = moba_attention(q, k, v, block_size=8, top_k=4, router=router)
    assert got.loss.item() == pytest.approx(0, abs=1e-5)
    rows = 8 * (torch.tensor([2.0]).log() + 5 * torch.tensor([3.0]).log())
    assert float(got.entropy) == pytest.approx(float(rows), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_follows_dtype_and_cuts_change_little(dtype, monkeypatch):
    """Losses are in fp32, gradients in the router's dtype; neither tiles nor workspace change more than rounding."""
    q, k, v = attention_inputs(201, 4, 2, dtype=dtype)
    found = []
    for cut, workspace in ((2**20, None), (600, 20000)):
        monkeypatch.setattr("moba_megatron.ops.router_loss.GATHERED_ON_CPU", cut)
        router = router_of(201, 2, 1, dtype=dtype, loss="sparse")
        _, got = moba_attention(
            q, k, v, BOUNDS, block_size=16, top_k=4, backend="gathered", router=router, workspace_bytes=workspace
        )
        gradients = torch.autograd.grad(got.loss, (router.q, router.k))
        assert got.loss.dtype == torch.float32 and {x.dtype for x in gradients} == {dtype}
        found.append([got.loss.detach(), got.entropy, *gradients])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_nothing_to_learn_is_zero_and_connected(num_tokens):
    q, k, v = attention_inputs(num_tokens, 2, 1)
    router = router_of(num_tokens, 1, 1, loss="sparse")
    for backend in ("reference", "gathered", "auto"):
        out, got = moba_attention(q, k, v, block_size=4, top_k=3, backend=backend, router=router)
        assert out.shape == q.shape and got.loss.item() == float(got.entropy) == 0 and float(got.tokens) == num_tokens
        assert all(
            float(x.abs().sum()) == 0
            for x in torch.autograd.grad(got.loss, (router.q, router.k), allow_unused=True)
            if x is not None
        )


def test_auto_takes_full_attention_only_without_a_loss():
    q, k, v = attention_inputs(32, 2, 1, dtype=torch.float32)
    full = moba_attention(q, k, v, block_size=8, top_k=4)
    assert torch.equal(moba_attention(q, k, v, block_size=8, top_k=4, router=router_of(32, 1, 1, dtype=q.dtype)), full)
    out, got = moba_attention(q, k, v, block_size=8, top_k=4, router=router_of(32, 1, 1, dtype=q.dtype, loss="sparse"))
    torch.testing.assert_close(out, full, rtol=1e-5, atol=1e-5)
    assert got.loss.item() > 0


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        ({"q": (8, 3, 6)}, {}, "router.q has 3 heads: give one for each of the 2 key heads, or for each of the 4"),
        ({"k": (8, 4, 6)}, {}, "router.k has 4 heads: give one that is shared, or one for each of the 2 key heads"),
        ({"k": (8, 1, 4)}, {}, "one head size of at least 1, got 6 and 4"),
        ({"q": (7, 2, 6)}, {}, "must have the 8 tokens of q, got 7"),
        ({"q": (8, 6)}, {}, r"router.q must be \[tokens, heads, router head size\], got shape \(8, 6\)"),
        ({}, {"selector": "recent"}, "selector = 'recent' looks at no scores, so a router has no effect"),
        ({}, {"summary": "min_max"}, "summary = 'min_max' with a router"),
        ({}, {"share_selection": "mean"}, "share_selection = 'mean' with a router of 2 heads and 1 key heads"),
        ({"loss": "full"}, {}, "router.loss = 'full': choose one of none, sparse, dense"),
        ({"loss_mask": torch.ones(3)}, {}, r"router.loss_mask must be \[8\] on cpu, got \(3,\)"),
        ({"dtype": torch.float32}, {}, "q and router.q must have one dtype and device, got torch.float64 on cpu"),
    ],
)
def test_bad_routers(change, how, message):
    q, k, v = attention_inputs(8, 4, 2)
    change = {"q": (8, 2, 6), "k": (8, 1, 6), "dtype": torch.float64, **change}
    shapes, dtype = (change.pop("q"), change.pop("k")), change.pop("dtype")
    router = Router(*(torch.zeros(shape, dtype=dtype) for shape in shapes), **change)
    with pytest.raises(ValueError, match=message):
        moba_attention(q, k, v, block_size=2, top_k=2, router=router, **how)
    with pytest.raises(ValueError, match=message):
        select_blocks(q, k, block_size=2, top_k=2, router=router, **how)


def test_traced_calls_choose_by_the_router_and_refuse_its_loss():
    q, k, v = (x.to("meta") for x in attention_inputs(64, 4, 2))
    router = Router(*(torch.empty(64, h, 6, dtype=q.dtype, device="meta") for h in (2, 1)))
    assert moba_attention(q, k, v, block_size=8, top_k=2, router=router).shape == q.shape
    with pytest.raises(ValueError, match="router.loss = 'sparse' under torch.compile"):
        moba_attention(q, k, v, block_size=8, top_k=2, router=Router(router.q, router.k, "sparse"))
    q, k, v = attention_inputs(64, 4, 2)
    router = router_of(64, 2, 1)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(q, k, v, router_q, router_k):
        return moba_attention(q, k, v, block_size=8, top_k=2, router=Router(router_q, router_k))

    want = moba_attention(q, k, v, block_size=8, top_k=2, router=router)
    assert torch.equal(compiled(q, k, v, router.q.detach(), router.k.detach()), want)
