"""Backends beside ours: refusals without them, and the wiring of their adapters through stand-ins.

A stand-in is a module of the package's name whose function has the package's signature and computes by our own
reference what the package promises. It proves that arguments arrive where they belong, and nothing about the package.
"""

import importlib.machinery
import importlib.util
import sys

import pytest
import torch

from moba_megatron.ops import (
    adapters,
    full_attention,
    full_backend_names,
    moba_attention,
    resolve_backend,
    resolve_full_backend,
)


def qkv(tokens=200, heads=4, kv_heads=2, size=8, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, h, size, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads)]


def install(monkeypatch, name, **functions):
    """Put a stand-in module in place, and let every device pass."""
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None))
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(adapters, "_ampere_problem", lambda device: None)
    adapters._import_problem.cache_clear()


@pytest.fixture(autouse=True)
def forget_packages():
    yield
    adapters._import_problem.cache_clear()


@pytest.fixture
def flash_moba(monkeypatch):
    def flash_moba_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, moba_chunk_size, moba_topk, causal=True
    ):
        assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
        return moba_attention(q, k, v, cu_seqlens_q, block_size=moba_chunk_size, top_k=moba_topk, backend="reference")

    install(monkeypatch, "flash_moba", flash_moba_varlen_func=flash_moba_varlen_func)


@pytest.fixture
def flash_attn(monkeypatch):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert causal and dropout_p == 0.0 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
        return full_attention(q, k, v, cu_seqlens_q, softmax_scale=softmax_scale, backend="torch")

    install(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize("bounds", [None, [0, 70, 70, 200]])
def test_flash_moba_stand_in_gets_the_call(flash_moba, bounds):
    q, k, v = qkv()
    cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int64)
    settings = {"block_size": 64, "top_k": 2, "max_seqlen": None if bounds is None else 130}
    got = moba_attention(q, k, v, cu, backend="flash_moba", **settings)
    assert torch.equal(got, moba_attention(q, k, v, cu, backend="reference", **settings))
    assert resolve_backend("auto", "cpu")[0] != "flash_moba"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 96}, "block_size 96: a multiple of 64"),
        ({"top_k": 65}, "top_k 65: at most 64"),
        ({"softmax_scale": 0.5}, r"softmax_scale 0\.5: only the default"),
        ({"dtype": torch.float32}, "torch.float32: bf16 or fp16"),
        ({"size": 12}, "head size 12: a multiple of 8"),
    ],
)
def test_flash_moba_refuses_what_the_package_cannot(flash_moba, change, message):
    inputs = {name: change.pop(name) for name in ("dtype", "size") if name in change}
    settings = {"block_size": 64, "top_k": 2} | change
    with pytest.raises(ValueError, match=message):
        moba_attention(*qkv(**inputs), backend="flash_moba", **settings)


@pytest.mark.parametrize("bounds", [None, [0, 70, 70, 200]])
def test_flash_attn_stand_in_gets_the_call(flash_attn, bounds):
    q, k, v = qkv()
    cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int64)
    want = full_attention(q, k, v, cu, softmax_scale=0.7, backend="torch")
    for backend in ("flash_attn", "auto"):
        assert torch.equal(full_attention(q, k, v, cu, softmax_scale=0.7, max_seqlen=130, backend=backend), want)


def test_auto_takes_flash_attn_only_for_what_it_takes(flash_attn):
    assert resolve_full_backend("auto", "cpu", torch.bfloat16)[0] == "flash_attn"
    name, reason = resolve_full_backend("auto", "cpu", torch.float32)
    assert name == "torch" and "not torch.float32" in reason
    with pytest.raises(ValueError, match="'flash_attn' is not available: it takes .*, not torch.float32"):
        full_attention(*qkv(dtype=torch.float32), backend="flash_attn")
    with pytest.raises(ValueError, match="head sizes up to 256, not 264"):
        full_attention(*qkv(size=264), backend="flash_attn")


def test_a_package_that_does_not_import_says_why(monkeypatch, tmp_path):
    (tmp_path / "flash_moba.py").write_text("raise OSError('libcudart.so.12 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(adapters, "_ampere_problem", lambda device: None)
    adapters._import_problem.cache_clear()
    with pytest.raises(ValueError, match="flash_moba does not import: OSError: libcudart.so.12 is missing"):
        resolve_backend("flash_moba", "cuda")


@pytest.mark.parametrize("name", ["flash_attn", "flash_moba"])
def test_a_folder_of_the_name_is_not_the_package(monkeypatch, tmp_path, name):
    """flash-attn-4 alone leaves `flash_attn` as a namespace that imports and holds no function."""
    (tmp_path / name / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(adapters, "_ampere_problem", lambda device: None)
    adapters._import_problem.cache_clear()
    problem = getattr(adapters, f"{name}_unavailable")(torch.device("cuda"))
    assert problem.startswith(f"{name} is there without {name}_varlen_func")
    if name == "flash_attn":
        chosen, reason = resolve_full_backend("auto", "cuda", torch.bfloat16)
        assert chosen == "torch" and "is there without" in reason


def test_refusals_without_packages_and_devices():
    assert full_backend_names() == ["auto", "torch", "torch_flash", "cudnn", "flash_attn"]
    with pytest.raises(ValueError, match="'flash_moba' is not available: it needs a CUDA device, not cpu"):
        moba_attention(*qkv(), block_size=64, top_k=2, backend="flash_moba")
    for name in ("torch_flash", "cudnn", "flash_attn"):
        with pytest.raises(ValueError, match=f"'{name}' is not available: it needs a CUDA device, not cpu"):
            full_attention(*qkv(), backend=name)
    with pytest.raises(ValueError, match="unknown full-attention backend 'flash'; choose one of auto, torch"):
        full_attention(*qkv(), backend="flash")
