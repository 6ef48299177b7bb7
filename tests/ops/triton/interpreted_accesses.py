"""What every program of every kernel loads, stores and adds to: no two meet, nothing lies outside, nothing unwritten is
read, and their order does not show in a single bit. The whole interpreted suite is watched with `--memory-accesses`."""

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from gpu.gpu_checks import check_fragments
from kernel_examples import cu, inputs

from moba_megatron.ops import kernel_sizes, moba_attention, select_blocks
from moba_megatron.ops import triton as kernels
from moba_megatron.ops.decode import block_means
from moba_megatron.ops.triton import catalog, config

# Its tests watch by themselves.
WATCHES_ITSELF = True
ORDERS = ("natural", "reverse", 1)


@triton.jit
def two_programs(x_ptr, y_ptr, HOW: tl.constexpr):
    """Faults between programs, by name."""
    program = tl.program_id(0)
    lanes = tl.arange(0, 8)
    if HOW == "store":
        tl.store(x_ptr + program * 4 + lanes, lanes)
    if HOW == "load":
        tl.store(x_ptr + program * 8 + lanes, tl.load(x_ptr + (1 - program) * 8 + lanes))
    if HOW == "add":
        tl.atomic_add(x_ptr + lanes, lanes)
        tl.debug_barrier()
        tl.store(y_ptr + program * 8 + lanes, tl.load(x_ptr + lanes))
    if HOW == "float":
        tl.atomic_add(y_ptr + lanes, 1.0)
    if HOW == "outside":
        tl.store(x_ptr + program * 8 + lanes + 1, lanes)


@triton.jit
def one_program(x_ptr, HOW: tl.constexpr):
    """Faults within a program, by name."""
    lanes = tl.arange(0, 8)
    if HOW == "lanes":
        tl.store(x_ptr + lanes // 2, lanes)
    if HOW == "read after write":
        tl.store(x_ptr + lanes, lanes)
        tl.store(x_ptr + 8 + lanes, tl.load(x_ptr + 7 - lanes))
    if HOW == "write after read":
        tl.store(x_ptr + lanes, tl.load(x_ptr + 7 - lanes))
    if HOW == "barrier":
        tl.store(x_ptr + lanes, lanes)
        tl.debug_barrier()
        tl.store(x_ptr + 8 + lanes, tl.load(x_ptr + 7 - lanes))
    if HOW == "add after store":
        tl.store(x_ptr + lanes, lanes)
        tl.atomic_add(x_ptr + lanes // 2, 1)
    if HOW == "load after add":
        tl.atomic_add(x_ptr + lanes // 2, 1)
        tl.store(x_ptr + 8 + lanes, tl.load(x_ptr + lanes))
    if HOW == "barriers around add":
        tl.store(x_ptr + lanes, lanes)
        tl.debug_barrier()
        tl.atomic_add(x_ptr + lanes // 2, 1)
        tl.debug_barrier()
        tl.store(x_ptr + 8 + lanes, tl.load(x_ptr + lanes))
    if HOW == "own lanes":
        tl.store(x_ptr + lanes, tl.load(x_ptr + lanes) + 1)
    if HOW == "equal values":
        tl.store(x_ptr + lanes // 2, lanes // 2)


@pytest.mark.parametrize(
    ("how", "finding"),
    [
        ("store", "two programs store at one place"),
        ("load", "one program loads what another stores"),
        ("add", "programs add to what others load or store"),
        ("float", "float atomics"),
        ("outside", "stores outside of its tensors"),
    ],
)
def test_faults_between_programs_are_found(how, finding):
    x, y = torch.zeros(16, dtype=torch.int32), torch.zeros(16)
    with interpreter.watching() as watch:
        two_programs[(2,)](x[:16], y, how)
    assert f"two_programs: {finding}" in watch.findings and watch.launches == {"two_programs": 1}


@pytest.mark.parametrize(
    ("how", "finding"),
    [
        ("lanes", "two lanes store different values at one place"),
        ("read after write", "loads what it has stored, without a barrier"),
        ("write after read", "stores what another lane has loaded, without a barrier"),
        ("add after store", "adds to what it has stored, without a barrier"),
        ("load after add", "loads what it has added to, without a barrier"),
        ("barriers around add", None),
        ("barrier", None),
        ("own lanes", None),
        ("equal values", None),
    ],
)
def test_faults_within_a_program_are_found(how, finding):
    with interpreter.watching() as watch:
        one_program[(1,)](torch.zeros(16, dtype=torch.int32), how)
    assert watch.findings == ({f"one_program: {finding}"} if finding else set()) and watch.accesses


def test_memory_is_poisoned():
    with interpreter.poisoned_memory():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(4).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) > 2**30).all() and torch.empty_like(torch.ones(2)).isnan().all()
    assert torch.empty.__module__ != interpreter.__name__


def test_rounding_is_that_of_pytorch():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    x[:3] = torch.tensor([torch.nan, torch.inf, 1 + 2**-8])
    got = torch.empty(4096, dtype=torch.bfloat16)
    narrow[(1,)](x, got)
    assert torch.equal(got.view(torch.int16)[1:], x.bfloat16().view(torch.int16)[1:]) and got[0].isnan()


@triton.jit
def narrow(x_ptr, y_ptr):
    lanes = tl.arange(0, 4096)
    tl.store(y_ptr + lanes, tl.load(x_ptr + lanes).to(tl.bfloat16))


def everything(monkeypatch) -> list[torch.Tensor]:
    """A forward and backward pass of a pack over short and long blocks in small passes, cut entries, and decoding."""
    monkeypatch.setattr(config, "SPLIT_ENTRIES", 16)
    monkeypatch.setattr(kernel_sizes, "SCREENED_BLOCKS", 1)
    monkeypatch.setattr(config, "ADD_AT_ONCE", 2)
    found = []
    for bounds, dtype, block_size, top_k, workspace in (
        ([0, 5, 5, 60], torch.float32, 8, 3, 16_000),
        ([0, 33, 80], torch.bfloat16, 16, 3, None),
        ([0, 140], torch.float32, 70, 2, None),
    ):
        q, k, v, do = inputs(bounds[-1], 2, 1, dtype=dtype)
        bounds = cu(bounds)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        settings = {"block_size": block_size, "top_k": top_k}
        out = moba_attention(*leaves, bounds, backend="triton", workspace_bytes=workspace, **settings)
        ids = select_blocks(q, k, bounds, **settings)
        found += [ids, out.detach(), *torch.autograd.grad(out, leaves, do)]
    q, k, v, _ = (x.detach() for x in inputs(64, 4, 2))
    summaries = torch.full((1, 8, 2, 16), torch.nan)
    summaries[0, :7] = block_means(k[:56], 8)
    lengths = torch.tensor([64])
    kernels.complete_summaries(k.unsqueeze(0), summaries, lengths, 8)
    decoded = kernels.decode_cached(
        q[-1:], k.unsqueeze(0), v.unsqueeze(0), summaries, lengths, block_size=8, top_k=3, softmax_scale=0.25
    )
    check_fragments(kernels, "cpu", torch.float32, 3)
    return [*found, summaries, decoded]


def test_programs_in_any_order_give_the_same_bits(monkeypatch):
    results, seen = [], set()
    for order in ORDERS:
        with interpreter.poisoned_memory(), interpreter.watching(order) as watch:
            results.append(everything(monkeypatch))
        assert not watch.findings, (order, sorted(watch.findings))
        seen |= set(watch.launches)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.isfinite().all() and torch.equal(a, b)
    # Every kernel that is compiled for GPUs was met.
    assert seen == {
        made.name for made in catalog.configurations(dtypes=[torch.bfloat16, torch.float32], head_sizes=[64])
    }
