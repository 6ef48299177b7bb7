"""The operator on a GPU: `pytest -m gpu`."""

import importlib

import gpu_checks as checks
import pytest
import torch
from gpu_checks import Shape
from torch.utils.flop_counter import FlopCounterMode
from workspace_formula import workspace_bounds

from moba_megatron.ops import moba_attention, resolve_backend
from moba_megatron.ops.backends import BACKENDS
from moba_megatron.ops.kernel_sizes import screens
from moba_megatron.ops.pairs import attended_pairs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# One after the other under pytest-xdist's `--dist loadgroup`: two of them do not fit a GPU together.
ALONE_IN_MEMORY = pytest.mark.xdist_group("alone in memory")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OURS = ["gathered", "triton"]
SHAPES = {
    "one document": Shape((0, 2048), 64, 4),
    "odd": Shape((0, 1337), 100, 3),
    "tail": Shape((0, 2049), 128, 4, 8, 2, 128),
    "packed": Shape((0, 1, 1, 700, 733, 2000), 64, 4, 8, 1, 128),
    "uneven": Shape((0, *range(10, 200, 10), 2500), 32, 8),
    "top 1": Shape((0, 1500), 128, 1, size=128),
    "large top-k": Shape((0, 2100), 16, 64),
    "small blocks": Shape((0, 1500), 16, 16, 2, 2),
    "large blocks": Shape((0, 3000), 1024, 2, size=128),
    "head of 96": Shape((0, 1000, 1900), 64, 3, size=96),
    "head of 192": Shape((0, 1900), 64, 3, size=192),
    "head of 256": Shape((0, 1900), 256, 3, size=256),
    "short documents": Shape((0, 100, 130, 260), 512, 3),
}
# So many blocks that routing screens them, in 16 bits (`kernel_sizes.screens`).
SCREENED = {"3 of 525": Shape((0, 2099), 4, 3, size=128), "16 of 2100": Shape((0, 300, 2100), 1, 16)}
LARGE = Shape((0, 20_000, 70_001), 128, 8, 16, 4, 128)


@pytest.fixture(params=OURS)
def backend(request):
    reason = BACKENDS[request.param].unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_equals_the_definition(backend, shape, dtype):
    checks.check_against_definition(shape, "cuda", dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["one document", "tail", "uneven"])
def test_one_block_that_everybody_chooses(backend, name, dtype):
    shape = SHAPES[name]
    checks.check_against_definition(shape, "cuda", dtype, backend, checks.skewed_inputs(shape, "cuda", dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["one document", "tail", "packed", "uneven", "large top-k", "head of 96"])
def test_selection_equals_fp64(name, dtype):
    checks.check_selection(SHAPES[name], "cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCREENED)
def test_screened_selection_equals_fp64(name, dtype):
    shape = SCREENED[name]
    assert screens(-(-shape.tokens // shape.block_size), shape.top_k - 1, dtype.itemsize)
    checks.check_selection(shape, "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_the_same_bits(backend, dtype):
    checks.check_same_bits(LARGE, "cuda", dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tail", "packed", "large blocks", "short documents"])
def test_nothing_unwritten_is_read(backend, name, dtype):
    checks.check_poisoned(SHAPES[name], "cuda", dtype, backend)


@pytest.fixture
def kernels():
    resolve_backend("triton", "cuda")
    return importlib.import_module("moba_megatron.ops.triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block_size", "top_k"), [(64, 4), (512, 3), (100, 1)])
def test_decoding_equals_one_pass(kernels, block_size, top_k, dtype):
    checks.check_decoding(kernels, Shape((0, 3001), block_size, top_k, 8, 2, 128), "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [2, 3])
def test_fragments_equal_the_portable_backend(kernels, top_k, dtype):
    checks.check_fragments(kernels, "cuda", dtype, top_k)


@pytest.mark.parametrize("bounds", [(0, 4096), (0, 1000, 1001, 4096)])
def test_the_host_never_waits(kernels, bounds):
    """Once compiled: nothing is read from the device or copied to it, forward and backward."""
    shape = Shape(bounds, 128, 4, 8, 2, 128)
    attend = checks.operator(shape, "cuda", "triton")
    if len(bounds) == 2:
        attend = lambda *x: moba_attention(*x, backend="triton", **shape.settings)  # noqa: E731
    arguments = checks.inputs(shape, "cuda", torch.bfloat16)
    checks.results(attend, *arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        checks.results(attend, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ALONE_IN_MEMORY
def test_addresses_beyond_32_bits():
    """Queries, keys and values of more than 2^31 elements each, and partial outputs likewise."""
    if torch.cuda.get_device_properties(0).total_memory < 100e9:
        pytest.skip("needs 100 GB")
    resolve_backend("triton", "cuda")
    shape = Shape((0, 2**19, 2**19 + 3001), 512, 3, 32, 32, 128)
    assert shape.tokens * shape.kv_heads * shape.size > 2**31
    checks.check_last_document(shape, "cuda", torch.bfloat16, "triton", workspace_bytes=2**33)


@ALONE_IN_MEMORY
def test_workspace_stays_within_its_bound():
    """Beside selected ids and the saved log-sum-exp, at most half of q + k + v + out forward, all of it backward."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    resolve_backend("triton", "cuda")
    shape = Shape((0, 2**19), 128, 8, 32, 8, 128)
    forward, backward = checks.forward_backward_peaks(shape, torch.bfloat16, "triton")
    qkvo = 2 * shape.tokens * (2 * shape.heads + 2 * shape.kv_heads) * shape.size
    saved = shape.tokens * shape.heads * 4 * shape.top_k
    assert forward - saved <= 0.5 * qkvo, f"{forward - saved} of {qkvo} bytes"
    assert backward <= qkvo, f"{backward} of {qkvo} bytes"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["packed", "large top-k", "large blocks"])
def test_a_small_workspace_does_not_show(backend, name, dtype):
    """Passes of single kv heads, and of ranges of tokens; for the portable backend, which runs each kv block of
    each pass by itself, of few."""
    for workspace_bytes in (2**20, 2**16) if backend == "triton" else (2**20,):
        checks.check_workspace(SHAPES[name], "cuda", dtype, backend, workspace_bytes)


@ALONE_IN_MEMORY
@pytest.mark.parametrize("workspace_bytes", [2**24, 2**28])
def test_memory_keeps_to_its_formula(workspace_bytes):
    """What the docstring of `ops.triton.attention` promises; beside it routing's summaries and planes, the selected ids
    and the saved log-sum-exp forward, and delta backward."""
    resolve_backend("triton", "cuda")
    shape = Shape((0, 2**17), 128, 8, 16, 4, 128)
    forward, backward = checks.forward_backward_peaks(shape, torch.bfloat16, "triton", workspace_bytes)
    bounds = workspace_bounds(shape.tokens, 16, 4, 128, 2, 128, 8, workspace_bytes)
    rows, blocks = shape.tokens * shape.heads, shape.tokens // 128
    saved = 4 * rows * shape.top_k + blocks * shape.kv_heads * shape.size * (4 + 3 * 4)
    assert workspace_bytes // 2 < forward - saved <= bounds[0], (forward, saved, bounds)
    assert workspace_bytes // 2 < backward - 4 * rows <= bounds[1], (backward, bounds)


def test_compiled_code_gives_the_same_bits(backend):
    shape = SHAPES["packed"]
    q, k, v, do = checks.inputs(shape, "cuda", torch.bfloat16)
    eager = checks.operator(shape, "cuda", backend)
    compiled = torch.compile(eager, fullgraph=True)
    for got, want in zip(checks.results(compiled, q, k, v, do), checks.results(eager, q, k, v, do), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_operations_are_counted(device):
    if device == "cuda":
        resolve_backend("triton", device)
    q, k, v = (torch.randn(4096, heads, 64, device=device) for heads in (4, 2, 2))
    with FlopCounterMode(display=False) as counter:
        moba_attention(q, k, v, block_size=128, top_k=3)
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    assert counts["moba_megatron.attend"] == 4 * 4 * 64 * attended_pairs(4096, 128, 3)
