"""The host never waits for the GPU: on tensors without data a read of a value raises, wherever it is."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from without_data import kernels_on_meta  # noqa: E402

from moba_megatron.ops import Router, full_attention, moba_attention, select_blocks  # noqa: E402
from moba_megatron.ops.selection import SELECTORS, SUMMARIES, Selection  # noqa: E402
from moba_megatron.parallel import attention as context  # noqa: E402
from moba_megatron.parallel.context_plan import remember_boundaries  # noqa: E402
from moba_megatron.parallel.exchanges import EXCHANGES  # noqa: E402
from moba_megatron.parallel.wire import Pending, Wire, observe  # noqa: E402

TOKENS = 4096
SELECTIONS = [
    Selection(selector, summary, 0.5 if selector == "threshold" else None)
    for selector in SELECTORS
    for summary in SUMMARIES
    if summary == "mean" or Selection.of_settings(selector, summary, 0.5).uses_scores
] + [Selection(share_selection="mean")]


@pytest.fixture
def launches(monkeypatch):
    return kernels_on_meta(monkeypatch)


def leaves(tokens=TOKENS, heads=8, kv_heads=2):
    sizes = [(tokens, n, 64) for n in (heads, kv_heads, kv_heads)]
    return [torch.empty(size, dtype=torch.bfloat16, device="meta", requires_grad=True) for size in sizes]


def test_reading_raises():
    """What the tests below rest on."""
    with pytest.raises(RuntimeError):
        torch.empty(3, device="meta").tolist()
    with pytest.raises(NotImplementedError):
        torch.empty(3, device="meta").cpu()
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.empty((), device="meta"))


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("bounds", ["one document", "pack", "pack with max_seqlen"])
def test_the_operator(launches, selection, bounds):
    documents = None if bounds == "one document" else torch.empty(6, dtype=torch.int32, device="meta")
    settings = {"block_size": 64, "top_k": 4, "max_seqlen": 1000 if bounds.endswith("max_seqlen") else None}
    q, k, v = leaves()
    out = moba_attention(q, k, v, documents, backend="triton", **settings, **selection.settings)
    forward = {name for name, _ in launches}
    out.backward(torch.empty_like(out))
    assert q.grad.shape == q.shape and k.grad.shape == v.grad.shape == k.shape
    assert "past_fwd_short" in forward
    assert {name for name, _ in launches} - forward
    ids = select_blocks(q, k, documents, **settings, **selection.settings)
    assert ids.shape == (TOKENS, 8, 4)


def router(tokens, loss="sparse"):
    """One choice for each of two key heads, by a shared key; half of the tokens count."""
    q, k = (torch.empty(tokens, n, 32, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (2, 1))
    return Router(q, k, loss, torch.empty(tokens, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("bounds", ["one document", "pack"])
def test_a_router_that_learns(launches, bounds):
    documents = None if bounds == "one document" else torch.empty(6, dtype=torch.int32, device="meta")
    chooser = router(TOKENS)
    out, got = moba_attention(*leaves(), documents, backend="triton", block_size=64, top_k=4, router=chooser)
    assert "past_fwd_short" in {name for name, _ in launches} and out.shape == (TOKENS, 8, 64)
    got.loss.backward()
    assert chooser.q.grad.shape == chooser.q.shape and chooser.k.grad.shape == chooser.k.shape


class WithoutData(Wire):
    """A wire on which nothing travels. What the host asks for with `read` is counted, and answered by one number; but
    that nothing goes to the rank itself."""

    def __init__(self, group):
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def shift(self, tensors, purpose):
        return Pending([], [torch.empty_like(tensor) for tensor in tensors])

    def all_gather(self, tensor, purpose):
        return Pending([], tensor.new_empty(self.size, *tensor.shape))

    def all_to_all(self, tensor, purpose, send=None, receive=None):
        rows = tensor.shape[0] if receive is None else sum(receive)
        assert send is None or sum(send) == tensor.shape[0]
        return Pending([], tensor.new_empty(rows, *tensor.shape[1:]))

    def all_reduce(self, tensor, purpose):
        return Pending([], tensor)

    def read(self, tensor):
        super().read(torch.empty(0))
        values = torch.full(tensor.shape, self.answer, dtype=tensor.dtype)
        if values.dim() == 3:
            values[:, self.rank] = 0
        return values

    answer = 0


class Group:
    """The second of two ranks."""

    def size(self):
        return 2

    def rank(self):
        return 1


@pytest.mark.parametrize("answer", [0, 3])
@pytest.mark.parametrize("block_size", [64, None])
@pytest.mark.parametrize("exchange", [name for name, kind in EXCHANGES.items() if not kind.two_levels])
def test_exchanges(launches, monkeypatch, exchange, block_size, answer):
    """But for what they read on purpose, which they tell beforehand and never do in the backward pass."""
    kind = EXCHANGES[exchange]
    if block_size is None and not kind.suits_full:
        pytest.skip("full layers do not use it")
    if answer and not kind.host_waits:
        pytest.skip("it reads nothing")
    monkeypatch.setattr(WithoutData, "answer", answer)
    monkeypatch.setattr(context, "Wire", WithoutData)
    # Full attention of a whole pack is another package's, or PyTorch's; it gets what the host knows of the lengths.
    whole = []
    monkeypatch.setattr(
        context, "full_attention", lambda q, k, v, **others: whole.append(others) or q + k.sum() + v.sum()
    )
    q, k, v = leaves(TOKENS // 2)
    # As the feed leaves them: on the device, and known on the host.
    documents = torch.empty(3, dtype=torch.int32, device="meta")
    remember_boundaries(documents, (0, 1024, TOKENS))
    with observe() as forward:
        out = context.context_attention(
            q, k, v, documents, cp_groups=context.ContextGroups(Group()), exchange=exchange, block_size=block_size,
            top_k=block_size and 4, backend="triton",
        )  # fmt: skip
    with observe() as backward:
        out.backward(torch.empty_like(out))
    assert launches or block_size is None
    if exchange == "a2a" and block_size is None:
        assert whole[0]["max_seqlen"] == TOKENS - 1024 and whole[0]["cu_seqlens"].is_meta
    assert q.grad.shape == q.shape and k.grad.shape == v.grad.shape == k.shape
    assert (forward.host_waits, backward.host_waits) == (kind.host_waits, 0)


@pytest.mark.parametrize("loss", ["none", "sparse"])
@pytest.mark.parametrize("exchange", [name for name, kind in EXCHANGES.items() if not kind.two_levels])
def test_a_router_under_exchanges(launches, monkeypatch, exchange, loss):
    monkeypatch.setattr(WithoutData, "answer", 3)
    monkeypatch.setattr(context, "Wire", WithoutData)
    chooser, tensors = router(TOKENS // 2, loss), leaves(TOKENS // 2)
    documents = torch.empty(3, dtype=torch.int32, device="meta")
    remember_boundaries(documents, (0, 1024, TOKENS))
    with observe() as seen:
        found = context.context_attention(
            *tensors, documents, cp_groups=context.ContextGroups(Group()), exchange=exchange, block_size=64, top_k=4,
            backend="triton", router=chooser,
        )  # fmt: skip
        out = found[0] if loss == "sparse" else found
        out.backward(torch.empty_like(out))
        if loss == "sparse":
            found[1].loss.backward()
            assert chooser.k.grad.shape == chooser.k.shape
    assert launches and seen.host_waits == EXCHANGES[exchange].host_waits


def test_full_attention_of_a_pack(monkeypatch):
    """Through PyTorch's kernel for packs, which takes the boundaries from the device."""
    calls = []
    monkeypatch.setattr(
        torch.ops.aten, "_flash_attention_forward", lambda q, *rest, **_: calls.append(rest) or (q,), raising=False
    )
    monkeypatch.setattr("moba_megatron.ops.dense._runs_packs", lambda q, kernels: True)
    q, k, v = leaves()
    full_attention(q, k, v, torch.empty(6, dtype=torch.int32, device="meta"), backend="torch", max_seqlen=1000)
    assert calls[0][4:6] == (1000, 1000)
