"""What must hold of the operator on a GPU, as functions of device and backend, through public functions only.

They run on a CPU as well, so that the checks themselves are proven where there is no GPU (`test_gpu_checks.py`).
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops import gathered, moba_attention, select_blocks
from moba_megatron.ops.decode import block_means
from moba_megatron.ops.fragments import Fragment, Keys
from moba_megatron.ops.reference import reference_attend, reference_select

# Rows whose last chosen and first refused block score closer than this may choose either.
MARGIN = 1e-3


@dataclass(frozen=True)
class Shape:
    """Documents, heads and settings of one call."""

    bounds: tuple[int, ...]
    block_size: int
    top_k: int
    heads: int = 4
    kv_heads: int = 2
    size: int = 64

    @property
    def tokens(self) -> int:
        return self.bounds[-1]

    @property
    def settings(self) -> dict[str, int]:
        return {"block_size": self.block_size, "top_k": self.top_k}

    def cu_seqlens(self, device: str) -> Tensor:
        return torch.tensor(self.bounds, dtype=torch.int32, device=device)


def inputs(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q [T, N, D], k and v [T, G, D], and the gradient of the output [T, N, D]."""
    generator = torch.Generator(device).manual_seed(seed)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    sizes = [(shape.tokens, n, shape.size) for n in heads]
    return [torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes]


def results(attention, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


def operator(shape: Shape, device: str, backend: str, workspace_bytes: int | None = None):
    """The operator with everything but q, k and v given."""
    bounds = shape.cu_seqlens(device)
    return lambda *x: moba_attention(*x, bounds, backend=backend, workspace_bytes=workspace_bytes, **shape.settings)


def clear_rows(q: Tensor, k: Tensor, shape: Shape) -> Tensor:
    """bool [T, N]: rows whose choice of blocks does not hang on rounding, in fp64."""
    clear = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    num_past, repeat, block = shape.top_k - 1, q.shape[1] // k.shape[1], shape.block_size
    for start, end in zip(shape.bounds, shape.bounds[1:], strict=False):
        whole = (end - start) // block
        if num_past == 0 or whole <= num_past:
            continue
        means = k[start : start + whole * block].double().unflatten(0, (whole, block)).mean(1)
        scores = torch.einsum("tnd,mnd->tnm", q[start:end].double(), means.repeat_interleave(repeat, 1))
        own = torch.arange(end - start, device=q.device).view(-1, 1, 1) // block
        scores = scores.masked_fill(torch.arange(whole, device=q.device) >= own, -torch.inf)
        best = scores.topk(num_past + 1, dim=-1).values
        clear[start:end] = ~((best[..., -2] - best[..., -1]) < MARGIN)  # NaN where there are too few: clear
    return clear


def plain_attend(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, shape: Shape) -> Tensor:
    """What one would write in the inputs' own dtype: the yardstick of the tolerance."""
    repeat, device = q.shape[1] // k.shape[1], q.device
    position = torch.arange(q.shape[0], device=device)
    bounds = shape.cu_seqlens(q.device)
    document = torch.searchsorted(bounds[1:].long(), position, right=True)
    block = (position - bounds[document]) // shape.block_size
    same = document[:, None] == document
    own = same & (block[:, None] == block) & (position[:, None] >= position)
    chosen = (ids[..., None] == block).any(2) & same[:, None]
    scores = torch.einsum("tnd,snd->nts", q, k.repeat_interleave(repeat, 1)) / math.sqrt(q.shape[2])
    scores = scores.masked_fill(~(own | chosen.transpose(0, 1)), -torch.inf)
    return torch.einsum("nts,snd->tnd", scores.softmax(-1), v.repeat_interleave(repeat, 1))


def check_selection(shape: Shape, device: str, dtype: torch.dtype) -> None:
    """Chosen blocks, and their order by falling score, equal those of fp64 in every clear row."""
    q, k, _, _ = inputs(shape, device, dtype)
    bounds = shape.cu_seqlens(device)
    ids = select_blocks(q, k, bounds, **shape.settings)[..., 1:]
    exact = reference_select(q.double(), k.double(), bounds, shape.block_size, shape.top_k - 1)
    clear = clear_rows(q, k, shape)
    assert clear.double().mean() > 0.9
    assert torch.equal(ids.sort(-1).values[clear], exact.sort(-1).values[clear])
    assert (ids != exact).double().mean() < 1e-2


def skewed_inputs(shape: Shape, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Inputs of which every query chooses the first block of its document first: one block has nearly all entries, and
    programs that work through them in pieces."""
    q, k, v, do = inputs(shape, device, dtype)
    q[..., 0] = q[..., 0].abs() + 1
    for start in shape.bounds[:-1]:
        k[start : start + shape.block_size, :, 0] += 4
    return [q, k, v, do]


def check_against_definition(
    shape: Shape, device: str, dtype: torch.dtype, backend: str, tensors: list[Tensor] | None = None
) -> None:
    """Output and gradients in fp64 with the same ids: at most twice the error of plain PyTorch, and rounding."""
    q, k, v, do = tensors or inputs(shape, device, dtype)
    bounds, scale = shape.cu_seqlens(device), 1 / math.sqrt(shape.size)
    clear = clear_rows(q, k, shape).unsqueeze(-1)
    do = do * clear
    wide = [x.double() for x in (q, k, v, do)]
    ids = reference_select(wide[0], wide[1], bounds, shape.block_size, shape.top_k - 1)
    got = results(operator(shape, device, backend), q, k, v, do)
    want = results(lambda *x: reference_attend(*x, ids, bounds, shape.block_size, scale)[0], *wide)
    plain = results(lambda *x: plain_attend(*x, ids, shape), q, k, v, do)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, want, plain, strict=True):
        if name == "out":
            a, b, c = a * clear, b * clear, c * clear
        assert a.dtype == dtype and a.isfinite().all()
        # In fp32 the kernels' base-2 scores and rounded log-sum-exps tell as well.
        rounding = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps * float(b.abs().max())
        error, allowed = float((a - b).abs().max()), 2 * float((c - b).abs().max()) + rounding
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def check_same_bits(shape: Shape, device: str, dtype: torch.dtype, backend: str, runs: int = 3) -> None:
    """Output and gradients do not depend on what ran first."""
    tensors = inputs(shape, device, dtype)
    first = results(operator(shape, device, backend), *tensors)
    for _ in range(runs - 1):
        again = results(operator(shape, device, backend), *tensors)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@contextlib.contextmanager
def deterministic(poisoned: bool):
    """PyTorch's deterministic algorithms; where poisoned, every buffer that it hands out uninitialised holds NaN, or
    the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = poisoned
    try:
        assert torch.empty(3).isnan().all() or not poisoned
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def check_poisoned(shape: Shape, device: str, dtype: torch.dtype, backend: str) -> None:
    """Nothing that was not written is read: the same bits where memory starts as NaN."""
    tensors = inputs(shape, device, dtype)

    def everything():
        ids = select_blocks(*tensors[:2], shape.cu_seqlens(device), **shape.settings)
        return [ids, *results(operator(shape, device, backend), *tensors)]

    with deterministic(poisoned=False):
        want = everything()
    with deterministic(poisoned=True):
        got = everything()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def check_last_document(
    shape: Shape, device: str, dtype: torch.dtype, backend: str, workspace_bytes: int | None = None
) -> None:
    """The last document of a pack, whose rows have the largest addresses, equals the same document alone."""
    tensors = inputs(shape, device, dtype)
    start, end = shape.bounds[-2:]
    alone = Shape((0, end - start), shape.block_size, shape.top_k, shape.heads, shape.kv_heads, shape.size)
    want = results(operator(alone, device, backend), *(x[start:end] for x in tensors))
    leaves = [x.requires_grad_() for x in tensors[:3]]
    out = operator(shape, device, backend, workspace_bytes)(*leaves)
    got = [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]
    for a, b in zip(got, want, strict=True):
        difference = (a[start:end].float() - b.float()).abs().max()
        assert difference <= 4 * torch.finfo(dtype).eps * b.float().abs().max()


def check_workspace(shape: Shape, device: str, dtype: torch.dtype, backend: str, workspace_bytes: int) -> None:
    """A small workspace gives the same output and gradients, up to the rounding of sums: in fp32 there are as many
    roundings as passes, thousands in the smallest workspace; the narrow types are rounded once more in the end."""
    tensors = inputs(shape, device, dtype)
    want = results(operator(shape, device, backend), *tensors)
    got = results(operator(shape, device, backend, workspace_bytes), *tensors)
    for a, b in zip(got, want, strict=True):
        difference = (a.float() - b.float()).abs().max()
        allowed = (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps * b.float().abs().max()
        assert difference <= allowed, f"{difference:.2e} > {allowed:.2e}"


def forward_backward_peaks(
    shape: Shape, dtype: torch.dtype, backend: str, workspace_bytes: int | None = None
) -> tuple[int, int]:
    """Bytes held at most on the GPU beyond inputs and outputs: in the forward pass alone, and in the backward."""
    leaves = [x.requires_grad_() for x in inputs(shape, "cuda", dtype)]
    do = leaves.pop().detach()
    attend = operator(shape, "cuda", backend, workspace_bytes)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend(*leaves)
    torch.cuda.synchronize()
    forward = torch.cuda.max_memory_allocated() - before - out.nbytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(out, leaves, do)
    torch.cuda.synchronize()
    backward = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in gradients)
    return forward, backward


def check_decoding(kernels, shape: Shape, device: str, dtype: torch.dtype) -> None:
    """The newest token of two texts in caches equals the last row of a pass over the whole text. The summary that it
    may complete is written by the kernels, the others are given.

    Args:
        kernels: `moba_megatron.ops.triton`, imported where its kernels run.
        shape: of one document, the longer text.
    """
    q, k, v, _ = inputs(shape, device, dtype)
    block, room = shape.block_size, shape.tokens + 5
    lengths = [shape.tokens, shape.tokens // block * block]
    caches = torch.full((2, 2, room, shape.kv_heads, shape.size), torch.nan, dtype=dtype, device=device)
    means = torch.full((2, room // block, shape.kv_heads, shape.size), torch.nan, device=device)
    want = []
    for number, length in enumerate(lengths):
        caches[0, number, :length], caches[1, number, :length] = k[:length], v[:length]
        whole = block_means(k[: length - 1].float(), block)
        means[number, : whole.shape[0]] = whole
        want.append(moba_attention(q[:length], k[:length], v[:length], backend="gathered", **shape.settings)[-1])
    now = torch.tensor(lengths, device=device)
    kernels.complete_summaries(caches[0], means, now, block)
    newest = torch.stack([q[length - 1] for length in lengths])
    scale = 1 / math.sqrt(shape.size)
    got = kernels.decode_cached(newest, *caches, means, now, softmax_scale=scale, **shape.settings)
    assert got.dtype == dtype
    difference = float((got.float() - torch.stack(want).float()).abs().max())
    allowed = 8 * torch.finfo(dtype).eps * max(1.0, float(torch.stack(want).abs().max()))
    assert difference <= allowed, f"{difference:.2e} > {allowed:.2e}"


def check_fragments(kernels, device: str, dtype: torch.dtype, top_k: int) -> None:
    """Keys that come in two fragments, as a context-parallel rank sees them: output, log-sum-exp and gradients are
    those of the portable backend.

    The queries are the last 40 of 120 tokens in blocks of 32. The first fragment holds their own rows, in causal
    spans and as a kv block, the end of the third block; the second all rows before them, with the start of that block,
    which is also what its own tokens see of it. The first holds one block that a query may choose: one slot is enough.
    """
    shape = Shape((0, 120), 32, top_k, size=64)
    q, k, v, do = inputs(shape, device, dtype)
    scale, qheads = 1 / math.sqrt(shape.size), shape.heads // shape.kv_heads
    ids = reference_select(q.float(), k.float(), shape.cu_seqlens(device), 32, top_k - 1)[80:]
    first_block = torch.zeros(40, dtype=torch.int64, device=device)
    own_kv_block = torch.where(torch.arange(80, 120, device=device) < 96, 2, -1).to(torch.int32)
    near_kv_blocks, far_kv_blocks = torch.tensor([[-1, -1, 0, -1], [0, 1, 2, -1]], dtype=torch.int32, device=device)
    near = Fragment([(0, 16)], [(0, 1, 16), (16, 1, 24)], first_block, near_kv_blocks, most_held=1)
    far = Fragment([(0, 32), (32, 64), (64, 80)], [], first_block, far_kv_blocks, own_kv_block)
    tasks = [(Keys(k[80:], v[80:], qheads), ids, near), (Keys(k[:80], v[:80], qheads), ids, far)]

    def all_of(ops) -> list[Tensor]:
        rows, do_rows = q[80:].contiguous(), do[80:].contiguous()
        out = torch.zeros(rows.shape, device=device)
        lse = torch.full(rows.shape[:2], -torch.inf, device=device)
        for keys, chosen, fragment in tasks:
            ops.accumulate(rows, keys, chosen, fragment, scale, out, lse)
        dq, delta = torch.zeros(rows.shape, device=device), ops.output_delta(do_rows, out.to(dtype))
        partials = []
        for keys, chosen, fragment in tasks:
            dk, dv = torch.full((2, *keys.k.shape), torch.nan, dtype=dtype, device=device)
            ops.accumulate_backward(
                do_rows, rows, keys, chosen, fragment, scale, out.to(dtype), lse, delta, dq, dk, dv
            )  # fmt: skip
            partials += [dk, dv]
        return [out, lse, dq, *partials]

    expected = all_of(gathered)
    whole = moba_attention(q, k, v, backend="gathered", **shape.settings)[80:].float()
    assert float((expected[0] - whole).abs().max()) <= 8 * torch.finfo(dtype).eps * float(whole.abs().max())
    for got, want in zip(all_of(kernels), expected, strict=True):
        difference, largest = float((got - want).abs().max()), float(want.abs().max())
        assert difference <= 16 * torch.finfo(dtype).eps * max(largest, 1.0), f"{difference:.2e} of {largest:.2e}"
