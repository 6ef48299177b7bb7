"""Backends beside ours: refusals without them, and the wiring of their adapters through stand-ins.

A stand-in is a module of the package's name. Its function binds a call to the package's signature, recorded from its
sources, and computes by our own reference what the package promises. It proves that arguments arrive where they belong,
and nothing about the package.
"""

import importlib.machinery
import importlib.util
import inspect
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
from moba_megatron.ops.backends import BACKENDS, FULL_BACKENDS

# The parameters of each package's function, in order, with the defaults that a call here relies on. Where they stand:
# Dao-AILab/flash-attention 0251105a: flash_attn/flash_attn_interface.py, hopper/flash_attn_interface.py,
# flash_attn/cute/interface.py; mit-han-lab/flash-moba 39d9ac04: flash_moba/flash_moba_interface.py.
SIGNATURES = {
    "flash_attn": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 softmax_scale=None "
    "causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False return_attn_probs=False "
    "block_table=None",
    "flash_attn_interface": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q=None seqused_k=None "
    "softmax_scale=None causal=False qv=None q_descale=None k_descale=None v_descale=None window_size=(-1,-1) "
    "attention_chunk=0 softcap=0.0 num_splits=1 pack_gqa=None deterministic=False sm_margin=0 return_attn_probs=False",
    "flash_attn.cute": "q k v qv=None cu_seqlens_q=None cu_seqlens_k=None max_seqlen_q=None max_seqlen_k=None "
    "min_seqlen_k=None seqused_q=None seqused_k=None gather_kv_indices=None page_table=None softmax_scale=None "
    "causal=False window_size=(None,None) learnable_sink=None softcap=0.0 num_splits=1 pack_gqa=None "
    "deterministic=False score_mod=None score_mod_bwd=None mask_mod=None block_sparse_tensors=None aux_tensors=None "
    "aux_scalars=None return_lse=False scheduler_metadata=None seqlen_k_per_split=None "
    "disable_scheduler_metadata=False",
    "flash_moba": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k moba_chunk_size moba_topk causal=True",
}
MODULES = {"flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface", "flash_attn_4": "flash_attn.cute"}


def signature_of(module):
    """The signature that a line of the table says."""
    words = (word.partition("=") for word in SIGNATURES[module].split())
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([
        inspect.Parameter(name, kind, default=eval(default) if equals else inspect.Parameter.empty)
        for name, equals, default in words
    ])  # fmt: skip


def qkv(tokens=200, heads=4, kv_heads=2, size=8, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, h, size, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads)]


GPU_PROBLEM = adapters._gpu_problem


def install(monkeypatch, module, **functions):
    """Put a stand-in module in place, with empty packages above it, and let every device pass."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        found = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None, is_package=True))
        monkeypatch.setitem(sys.modules, name, found)
    vars(found).update(functions)
    monkeypatch.setattr(adapters, "_gpu_problem", lambda device, majors: None)
    adapters._import_problem.cache_clear()


@pytest.fixture(autouse=True)
def forget_packages(monkeypatch):
    """What a test before imported under a package's name, and what was found out about it."""
    for module in (*MODULES.values(), "flash_moba"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    yield
    adapters._import_problem.cache_clear()


def called(module, args, kwargs):
    """What each parameter of the package's function gets from a call; every check that all of them share."""
    bound = signature_of(module).bind(*args, **kwargs)
    given = dict(bound.arguments)
    bound.apply_defaults()
    whole = bound.arguments
    assert whole["causal"] and whole["cu_seqlens_q"].dtype == whole["cu_seqlens_k"].dtype == torch.int32
    assert whole["max_seqlen_q"] == whole["max_seqlen_k"] >= int(whole["cu_seqlens_q"].diff().max())
    known = {"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal"}
    assert set(given) <= known | {"deterministic", "moba_chunk_size", "moba_topk"}
    return whole


@pytest.fixture
def flash_moba(monkeypatch):
    def flash_moba_varlen_func(*args, **kwargs):
        got = called("flash_moba", args, kwargs)
        settings = {"block_size": got["moba_chunk_size"], "top_k": got["moba_topk"], "backend": "reference"}
        return moba_attention(got["q"], got["k"], got["v"], got["cu_seqlens_q"], **settings)

    install(monkeypatch, "flash_moba", flash_moba_varlen_func=flash_moba_varlen_func)


@pytest.fixture(params=MODULES)
def flash_attention(request, monkeypatch):
    """The name of a backend, whose package is a stand-in."""
    module = MODULES[request.param]

    def flash_attn_varlen_func(*args, **kwargs):
        got = called(module, args, kwargs)
        assert got["deterministic"] is torch.are_deterministic_algorithms_enabled()
        bounds, scale = got["cu_seqlens_q"], got["softmax_scale"]
        out = full_attention(got["q"], got["k"], got["v"], bounds, softmax_scale=scale, backend="torch")
        return (out, None) if module == "flash_attn.cute" else out

    install(monkeypatch, module, flash_attn_varlen_func=flash_attn_varlen_func)
    return request.param


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
        ({"dtype": torch.float32}, "it takes torch.bfloat16 and torch.float16, not torch.float32"),
        ({"size": 12}, "head size 12: a multiple of 8"),
    ],
)
def test_flash_moba_refuses_what_the_package_cannot(flash_moba, change, message):
    inputs = {name: change.pop(name) for name in ("dtype", "size") if name in change}
    settings = {"block_size": 64, "top_k": 2} | change
    with pytest.raises(ValueError, match=message):
        moba_attention(*qkv(**inputs), backend="flash_moba", **settings)


@pytest.mark.parametrize("bounds", [None, [0, 70, 70, 200]])
def test_flash_attention_stand_in_gets_the_call(flash_attention, bounds):
    q, k, v = qkv()
    cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int64)
    want = full_attention(q, k, v, cu, softmax_scale=0.7, backend="torch")
    for backend in (flash_attention, "auto"):
        assert torch.equal(full_attention(q, k, v, cu, softmax_scale=0.7, max_seqlen=130, backend=backend), want)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(full_attention(q, k, v, cu, softmax_scale=0.7, backend=flash_attention), want)
    finally:
        torch.use_deterministic_algorithms(False)


def test_auto_takes_flash_attention_only_for_what_it_takes(flash_attention):
    name = flash_attention
    assert resolve_full_backend("auto", "cpu", torch.bfloat16, 128)[0] == name
    for dtype, size, words in ((torch.float32, 128, "not torch.float32"), (torch.bfloat16, 264, "not 264")):
        chosen, reason = resolve_full_backend("auto", "cpu", dtype, size)
        assert chosen == "torch" and words in reason
        with pytest.raises(ValueError, match=f"'{name}' is not available: it takes .*, {words}"):
            full_attention(*qkv(dtype=dtype, size=size), backend=name)
        assert full_attention(*qkv(dtype=dtype, size=size)).shape == (200, 4, size)


def test_each_version_is_for_its_gpus_and_the_newest_is_taken(monkeypatch):
    """By compute capability; with all three installed."""
    for module in MODULES.values():
        install(monkeypatch, module, flash_attn_varlen_func=lambda **words: None)
    # The package above version 4's module is version 2.
    sys.modules["flash_attn"].flash_attn_varlen_func = lambda **words: None
    monkeypatch.setattr(adapters, "_gpu_problem", GPU_PROBLEM)
    for capability, name in (
        ((7, 5), "torch"),
        ((8, 0), "flash_attn"),
        ((9, 0), "flash_attn_3"),
        ((10, 0), "flash_attn_4"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert resolve_full_backend("auto", "cuda", torch.bfloat16, 128)[0] == name
    with pytest.raises(
        ValueError, match=r"'flash_attn_3' is not available: it needs compute capability 9\.x, this GPU has 10"
    ):
        resolve_full_backend("flash_attn_3", "cuda", torch.bfloat16, 128)
    # Deterministic gradients of large heads are not version 3's.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_full_backend("auto", "cuda", torch.bfloat16, 256)[0] == "flash_attn_3"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert resolve_full_backend("auto", "cuda", torch.bfloat16, 256)[0] == "flash_attn_4"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    # Head sizes decide as well: the next version takes what the first does not.
    assert resolve_full_backend("auto", "cuda", torch.bfloat16, 192)[0] == "flash_attn"


def test_a_package_that_does_not_import_says_why(monkeypatch, tmp_path):
    (tmp_path / "flash_moba.py").write_text("raise OSError('libcudart.so.12 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(adapters, "_gpu_problem", lambda device, majors: None)
    adapters._import_problem.cache_clear()
    with pytest.raises(ValueError, match="flash_moba does not import: OSError: libcudart.so.12 is missing"):
        resolve_backend("flash_moba", "cuda")


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_3", "flash_moba"])
def test_a_folder_of_the_name_is_not_the_package(monkeypatch, tmp_path, name):
    """flash-attn-4 alone leaves `flash_attn` as a namespace that imports and holds no function."""
    module = MODULES.get(name, name)
    (tmp_path / module / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(adapters, "_gpu_problem", lambda device, majors: None)
    adapters._import_problem.cache_clear()
    problem = (BACKENDS | FULL_BACKENDS)[name].problem(torch.device("cuda"))
    assert problem.startswith(f"{module} is there without flash_")
    chosen, reason = resolve_full_backend("auto", "cuda", torch.bfloat16)
    assert chosen == "torch" and (name == "flash_moba" or "is there without" in reason)


def test_another_version_of_a_package_is_told(monkeypatch):
    """flash-attn 2.8.3 brings an early version 4 along, whose function takes no lengths."""

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False): ...

    install(monkeypatch, "flash_attn.cute", flash_attn_varlen_func=flash_attn_varlen_func)
    problem = FULL_BACKENDS["flash_attn_4"].problem(torch.device("cuda"))
    assert problem.startswith("flash_attn.cute is of another version: it takes no max_seqlen_q, max_seqlen_k, determin")


def test_what_a_package_misses_is_not_its_own_absence(monkeypatch, tmp_path):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("import a_package_of_nvidia")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(adapters, "_gpu_problem", lambda device, majors: None)
    adapters._import_problem.cache_clear()
    problem = FULL_BACKENDS["flash_attn_4"].problem(torch.device("cuda"))
    assert problem == "flash_attn.cute does not import: ModuleNotFoundError: No module named 'a_package_of_nvidia'"
    problem = FULL_BACKENDS["flash_attn_3"].problem(torch.device("cuda"))
    assert problem.startswith("the package flash_attn_interface is not installed (install the folder hopper")


def test_a_dtype_that_triton_refuses_goes_to_the_portable_backend(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_backend("auto", "cuda", torch.float32)[0] == resolve_backend("auto", "cuda")[0] == "triton"
    chosen, reason = resolve_backend("auto", "cuda", torch.float64)
    assert chosen == "gathered" and reason.endswith("not torch.float64")
    with pytest.raises(ValueError, match="backend 'triton' is not available: it takes .*, not torch.float64"):
        resolve_backend("triton", "cuda", torch.float64)


def test_refusals_without_packages_and_devices():
    assert full_backend_names() == ["auto", "torch", "torch_flash", "cudnn", *MODULES]
    with pytest.raises(ValueError, match="'flash_moba' is not available: it needs a CUDA device, not cpu"):
        moba_attention(*qkv(), block_size=64, top_k=2, backend="flash_moba")
    for name in ("torch_flash", "cudnn", *MODULES):
        with pytest.raises(ValueError, match=f"'{name}' is not available: it needs a CUDA device, not cpu"):
            full_attention(*qkv(), backend=name)
    with pytest.raises(ValueError, match="unknown full-attention backend 'flash'; choose one of auto, torch"):
        full_attention(*qkv(), backend="flash")
