"""Edge cases of the operator, refusals, backends, combining, documentation examples, and imports."""

import doctest
import importlib
import logging
import pkgutil
import subprocess
import sys

import pytest
import torch

import moba_megatron.ops
from moba_megatron.ops import backend_names, dense, full_attention, moba_attention, resolve_backend, select_blocks
from moba_megatron.ops.combine import combine, combine_weights
from moba_megatron.ops.dense import _one_document
from moba_megatron.ops.layout import block_layout

BACKENDS = ["auto", "reference", "gathered"]


def qkv(tokens=20, heads=2, kv_heads=1, size=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, h, size, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_document_shorter_than_a_block(backend):
    q, k, v = qkv()
    got = moba_attention(q, k, v, block_size=64, top_k=1, backend=backend)
    torch.testing.assert_close(got, full_attention(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "gathered"])
def test_short_last_block_is_never_a_candidate(backend):
    """Tokens 16 to 19 are a short block: nothing but their own queries depends on them, in values or gradients."""
    q, k, v = (x.requires_grad_() for x in qkv())
    out = moba_attention(q, k, v, block_size=8, top_k=3, backend=backend)
    (dv,) = torch.autograd.grad(out[:16].sum(), v)
    assert dv[16:].abs().max() == 0 and dv[:16].abs().min() > 0
    ids = select_blocks(q, k, block_size=8, top_k=3)
    assert ids[16:, :, 0].unique().tolist() == [2] and ids[..., 1:].max() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_documents_and_empty_packs(backend):
    q, k, v = qkv()
    one = moba_attention(q, k, v, block_size=4, top_k=2, backend=backend)
    bounds = torch.tensor([0, 0, 20, 20, 20], dtype=torch.int32)
    assert torch.equal(moba_attention(q, k, v, bounds, block_size=4, top_k=2, backend=backend), one)
    none = [x[:0].requires_grad_() for x in (q, k, v)]
    out = moba_attention(*none, torch.tensor([0, 0], dtype=torch.int32), block_size=4, top_k=2, backend=backend)
    out.sum().backward()
    assert out.shape == (0, 2, 4) and none[1].grad.shape == (0, 1, 4)
    assert select_blocks(none[0], none[1], block_size=4, top_k=2).shape == (0, 2, 2)


def test_gqa_selects_per_head_without_repeating_keys():
    q, k, v = qkv(64, heads=4, kv_heads=2, dtype=torch.float64)
    ids = select_blocks(q, k, block_size=4, top_k=2)
    for head in range(4):
        kv_head = slice(head // 2, head // 2 + 1)
        assert torch.equal(
            ids[:, head : head + 1], select_blocks(q[:, head : head + 1], k[:, kv_head], block_size=4, top_k=2)
        )
    assert not torch.equal(ids[:, 0], ids[:, 1])
    spread = moba_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), block_size=4, top_k=2)
    torch.testing.assert_close(moba_attention(q, k, v, block_size=4, top_k=2), spread)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept(backend, dtype):
    out = moba_attention(*qkv(dtype=dtype), block_size=4, top_k=2, backend=backend)
    assert out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "gathered"])
def test_large_scores_do_not_overflow(backend):
    q, k, v = qkv(64)
    out = moba_attention(q * 1e3, k * 1e3, v, block_size=8, top_k=3, backend=backend)
    assert out.isfinite().all()


def test_strided_inputs():
    q, k, v = qkv(64, heads=2, kv_heads=2)
    fused = torch.stack([q, k, v], dim=2).flatten(1, 2).unflatten(1, (2, 3))
    parts = [x.requires_grad_() for x in fused.detach().unbind(2)]
    want = moba_attention(q, k, v, block_size=8, top_k=3, backend="gathered")
    out = moba_attention(*parts, block_size=8, top_k=3, backend="gathered")
    assert torch.equal(out, want)
    plain = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    strided = upstream.transpose(0, 1).contiguous().transpose(0, 1)
    expected = torch.autograd.grad(moba_attention(*plain, block_size=8, top_k=3, backend="gathered"), plain, upstream)
    for got, gradient in zip(torch.autograd.grad(out, parts, strided), expected, strict=True):
        assert torch.equal(got, gradient)


def test_dense_attention_repeats_keys_where_no_fused_kernel_takes_groups(monkeypatch):
    """fp32 with grouped heads on CUDA, as in the quickstart without Transformer Engine."""
    assert not dense.takes_groups(torch.device("cuda"), torch.float32)
    assert dense.takes_groups(torch.device("cuda"), torch.bfloat16) and dense.takes_groups(
        torch.device("cpu"), torch.float32
    )
    q, k, v = (torch.randn(40, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    want = full_attention(q, k, v, torch.tensor([0, 15, 40]))
    expected = torch.autograd.grad(want.square().sum(), (q, k, v))
    calls, attend = [], dense.F.scaled_dot_product_attention

    def recorded(q, k, v, **how):
        calls.append((q.shape[1], k.shape[1], how["enable_gqa"]))
        return attend(q, k, v, **how)

    monkeypatch.setattr(dense, "takes_groups", lambda device, dtype: False)
    monkeypatch.setattr(dense.F, "scaled_dot_product_attention", recorded)
    got = full_attention(q, k, v, torch.tensor([0, 15, 40]))
    assert calls == [(4, 4, False)] * 2
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), (q, k, v)), expected)


def test_dense_attention_never_goes_quadratic():
    """PyTorch's fused kernel wants a contiguous last dimension and else falls back to a matrix of all scores."""
    q, k, v = qkv(64, heads=2, kv_heads=1)
    strided = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (q, k, v)]
    assert all(x.stride(-1) != 1 for x in strided)
    for bounds in (None, torch.tensor([0, 20, 64], dtype=torch.int32)):
        assert torch.equal(full_attention(*strided, bounds), full_attention(q, k, v, bounds))
    with pytest.raises(RuntimeError, match="(?i)no (viable|available)"):
        _one_document(*strided, 0.5)


@pytest.mark.parametrize("backend", ["reference", "gathered"])
def test_keys_of_the_future_do_not_even_leak_nan(backend):
    """Unseen keys of the own block are overwritten, not added to: rows before a broken key keep their values."""
    q, k, v = qkv(600)
    broken = k.clone()
    broken[200] = torch.nan
    broken[440] = torch.inf
    want = moba_attention(q, k, v, block_size=300, top_k=2, backend=backend)
    got = moba_attention(q, broken, v, block_size=300, top_k=2, backend=backend)
    torch.testing.assert_close(got[:200], want[:200], rtol=1e-5, atol=1e-6)
    assert got[200].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    """fp32 inputs are computed in fp32 under autocast too: selection, attention and gradients to the bit."""

    def results():
        leaves = [x.requires_grad_() for x in qkv(64, size=16)]
        out = moba_attention(*leaves, block_size=8, top_k=3, backend=backend)
        gradients = torch.autograd.grad(out.square().sum(), leaves) if backend != "reference" else []
        ids = select_blocks(leaves[0], leaves[1], block_size=8, top_k=3)
        return [out, full_attention(*leaves), ids, *gradients]

    want = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_boundaries_are_checked_wherever_they_are_read():
    """The values of boundaries on an accelerator are looked at when the host reads them for its index."""
    for bounds, message in (
        ([0, 12, 8, 20], "12 is followed by 8 at 2"),
        ([1, 20], "from 1 to 20"),
        ([0, 9], "0 to 9"),
    ):
        layout = block_layout(20, 4, torch.tensor(bounds))
        with pytest.raises(ValueError, match=message):
            layout.equal_blocks()
    layout = block_layout(20, 4, torch.tensor([0, 9, 20]))
    assert layout.equal_blocks() is layout.equal_blocks()


def test_softmax_scale_leaves_the_selection_alone():
    q, k, v = qkv(64)
    zero = moba_attention(q, k, v, block_size=8, top_k=2, softmax_scale=0.0, backend="gathered")
    ids = select_blocks(q, k, block_size=8, top_k=2)
    keys = list(range(56, 64)) + [8 * int(ids[63, 0, 1]) + i for i in range(8)]
    torch.testing.assert_close(zero[63, 0], v[keys, 0].mean(0))


def test_auto_says_once_that_it_is_full(caplog):
    q, k, v = qkv(33)
    with caplog.at_level(logging.INFO, logger="moba_megatron.ops"):
        for _ in range(2):
            moba_attention(q, k, v, block_size=11, top_k=3)
        moba_attention(q, k, v, block_size=11, top_k=2)
    assert [record.getMessage() for record in caplog.records if "11 tokens" in record.getMessage()] == [
        "auto: full causal attention where top_k = 3 blocks of 11 tokens cover every document"
    ]


REFUSED = [
    (dict(block_size=0), "block_size.*0"),
    (dict(top_k=0), "top_k.*0"),
    (dict(top_k=2.0), r"top_k.*2\.0"),
    (dict(q=torch.zeros(20, 3, 4), k=torch.zeros(20, 2, 4), v=torch.zeros(20, 2, 4)), "N = 3 and G = 2"),
    (dict(k=torch.zeros(20, 1, 4, dtype=torch.float64)), "float32 and torch.float64"),
    (dict(k=torch.zeros(20, 1, 4, device="meta")), "cpu and meta"),
    (dict(v=torch.zeros(20, 2, 4)), r"v \(20, 2, 4\)"),
    (dict(k=torch.zeros(19, 1, 4)), r"k \(19, 1, 4\)"),
    (dict(q=torch.zeros(1, 20, 2, 4)), r"\(1, 20, 2, 4\)"),
    (dict(q=torch.zeros(20, 2, 4, dtype=torch.int32)), "int32"),
    (dict(cu_seqlens=[0, 12, 8, 20]), "12 is followed by 8 at 2"),
    (dict(cu_seqlens=[1, 20]), "from 0 to the number of tokens, 20; it runs from 1 to 20"),
    (dict(cu_seqlens=[0, 19]), "0 to 19"),
    (dict(cu_seqlens=[0]), "at least one document"),
    (dict(cu_seqlens=[0.0, 20.0]), "float32"),
    (dict(backend="flash"), "unknown backend 'flash'.*gathered"),
    (dict(backend="triton"), "'triton' is not available"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals_name_the_values(change, message):
    settings = dict(zip("qkv", qkv(), strict=True)) | dict(block_size=4, top_k=2) | change
    if "cu_seqlens" in change:
        bounds = change["cu_seqlens"]
        settings["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32 if isinstance(bounds[0], int) else None)
    with pytest.raises(ValueError, match=message):
        moba_attention(**settings)


def test_backend_names_and_auto():
    assert backend_names() == ["auto", "reference", "gathered", "triton", "flash_moba"]
    assert resolve_backend("auto", "cpu")[0] == "gathered"
    assert resolve_backend("reference", torch.device("cpu"))[0] == "reference"


def test_merge_equals_softmax_over_everything():
    scores, values = torch.randn(5, 24, dtype=torch.float64), torch.randn(24, 3, dtype=torch.float64)
    parts = scores.split(8, dim=1)
    out = torch.stack([p.softmax(1) @ v for p, v in zip(parts, values.split(8), strict=True)])
    lse = torch.stack([p.logsumexp(1) for p in parts])
    whole, whole_lse = combine(out, lse)
    torch.testing.assert_close(whole, scores.softmax(1) @ values)
    torch.testing.assert_close(whole_lse, scores.logsumexp(1))
    out, lse = torch.cat([out, torch.zeros_like(out[:1])]), torch.cat([lse, torch.full_like(lse[:1], -torch.inf)])
    assert torch.equal(combine(out, lse)[0], whole)


def test_combining__nothing_is_zero():
    weights, lse = combine_weights(torch.full((2, 3), -torch.inf))
    assert torch.equal(weights, torch.zeros(2, 3)) and torch.equal(lse, torch.full((3,), -torch.inf))
    assert torch.equal(combine(torch.ones(2, 3, 4), torch.full((2, 3), -torch.inf))[0], torch.zeros(3, 4))


def test_examples_in_docstrings():
    folders = {"moba_megatron.ops": moba_megatron.ops, "moba_megatron.ops.gathered": moba_megatron.ops.gathered}
    names = [f"{path}.{m.name}" for path, folder in folders.items() for m in pkgutil.iter_modules(folder.__path__)]
    outcomes = [doctest.testmod(importlib.import_module(n)) for n in names if n != "moba_megatron.ops.triton"]
    assert sum(o.attempted for o in outcomes) >= 10 and all(o.failed == 0 for o in outcomes)


def test_imports_with_torch_alone():
    code = (
        "import sys\n"
        "for name in ('megatron', 'triton', 'transformers', 'pydantic', 'omegaconf'): sys.modules[name] = None\n"
        "import torch, moba_megatron.ops as ops\n"
        "print(ops.moba_attention(*torch.randn(3, 8, 2, 4).unbind(0), block_size=2, top_k=2).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "[8, 2, 4]" in done.stdout, done.stderr
