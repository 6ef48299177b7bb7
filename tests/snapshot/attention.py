"""The operator through its public names: outputs and gradients of every backend, selection, element type and pack."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moba_megatron.ops import full_attention, moba_attention, select_blocks
from moba_megatron.ops.decode import continue_text, decode_tokens
from snapshot.texts import describe, describe_all, write_lines

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Boundaries of documents; None is one document of 100 tokens.
PACKS = {"one": None, "odd": (0, 5, 5, 37, 100), "short": (0, 1, 2, 3, 64, 99, 100)}
# Query heads, key heads.
HEADS = ((2, 2), (8, 2))
# block_size, top_k: of one token, odd, more blocks than there are, larger than everything.
SIZES = ((8, 3), (7, 1), (1, 4), (16, 50), (13, 2), (200, 3))
SELECTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "min_max": {"summary": "min_max"},
    "threshold": {"selector": "threshold", "threshold": 0.7},
    "threshold of min_max": {"selector": "threshold", "summary": "min_max", "threshold": 0.4},
    "recent": {"selector": "recent"},
    "sink_recent": {"selector": "sink_recent"},
}
RESULTS = ("out", "dq", "dk", "dv")
TOKENS = 100


def inputs(heads: int, groups: int, dtype: torch.dtype, size: int = 16, tokens: int = TOKENS) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(tokens, n, size) for n in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def boundaries(pack: tuple[int, ...] | None) -> Tensor | None:
    """As int32, or None."""
    return None if pack is None else torch.tensor(pack, dtype=torch.int32)


def forward_and_backward(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> str:
    """A line of the output and the three gradients, or of the refusal."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    try:
        out = attention(*leaves)
        return describe_all(RESULTS, [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))])
    except ValueError as error:
        return f"refused: {error}"


def take_operator(out: Path) -> None:
    """Backends of portable PyTorch, full attention, chosen blocks, and the continuation of texts."""
    torch.set_num_threads(1)
    plain, others = {"plain": {}}, {name: settings for name, settings in SELECTIONS.items() if settings}
    some = {name: DTYPES[name] for name in ("fp32", "bf16")}
    for backend in ("reference", "gathered", "auto"):
        write_lines(out, f"operator/{backend}.txt", _moba(backend, DTYPES, SIZES, PACKS, HEADS, plain))
    for backend in ("reference", "gathered"):
        lines = _moba(backend, some, SIZES[:4], PACKS, HEADS[1:], others)
        write_lines(out, f"operator/{backend}_selections.txt", lines)
    write_lines(out, "operator/gathered_in_parts.txt", _in_parts("gathered", (1, 5_000, 40_000)))
    write_lines(out, "operator/full.txt", _full())
    write_lines(out, "operator/blocks.txt", _blocks(DTYPES, SIZES, HEADS))
    write_lines(out, "operator/other_arguments.txt", _other_arguments("gathered"))
    write_lines(out, "operator/continued.txt", _continued("gathered", DTYPES, SIZES))


def take_kernels(out: Path) -> None:
    """The GPU kernels in Triton's interpreter, which TRITON_INTERPRET=1 must have switched on before Triton came. It
    takes seconds a case: bf16 is left out because the interpreter multiplies it wrongly, large cases for their time."""
    torch.set_num_threads(1)
    fp32, few, plain = {"fp32": torch.float32}, {"few": (0, 5, 5, 21, 48)}, {"plain": {}}
    some = {name: SELECTIONS[name] for name in ("min_max", "threshold", "sink_recent")}
    sizes = ((16, 3), (13, 2), (16, 1), (70, 3), (5, 9))
    heads = ((1, 1), (4, 1))
    write_lines(out, "kernels/attention.txt", _moba("triton", fp32, sizes, few, heads, plain, tokens=48))
    one = {"one": None}
    write_lines(out, "kernels/key_heads.txt", _moba("triton", fp32, sizes[:1], one, ((2, 2),), plain, tokens=48))
    write_lines(out, "kernels/selections.txt", _moba("triton", fp32, sizes[:1], few, ((1, 1),), some, tokens=48))
    fp16 = {"fp16": torch.float16}
    write_lines(out, "kernels/half.txt", _moba("triton", fp16, sizes[:1], few, ((1, 1),), plain, tokens=48))
    write_lines(out, "kernels/head_size_24.txt", _moba("triton", fp32, sizes[:1], few, ((1, 1),), plain, 48, size=24))
    write_lines(out, "kernels/in_parts.txt", _in_parts("triton", (12_000,), ((2, 1),), tokens=48))
    write_lines(out, "kernels/continued.txt", _continued("triton", fp32, SIZES[:2]))


def _moba(
    backend: str, dtypes: dict, sizes: tuple, packs: dict, heads: tuple, selections: dict, tokens: int = TOKENS,
    size: int = 16,
) -> Iterator[str]:  # fmt: skip
    every = itertools.product(selections.items(), dtypes.items(), heads, packs.items(), sizes)
    for (selection, settings), (name, dtype), (queries, groups), (pack, bounds), (block_size, top_k) in every:
        known = {"block_size": block_size, "top_k": top_k, "backend": backend} | settings
        cu, tensors = boundaries(bounds), inputs(queries, groups, dtype, size, tokens)
        found = forward_and_backward(lambda *x, c=cu, s=known: moba_attention(*x, c, **s), *tensors)
        yield f"{selection} {name} heads={queries}/{groups} {pack} B={block_size} K={top_k}: {found}"


def _in_parts(backend: str, workspaces: tuple[int, ...], heads: tuple = HEADS, tokens: int = TOKENS) -> Iterator[str]:
    cu = boundaries((0, 5, 5, 37, tokens))
    for workspace, (queries, groups) in itertools.product(workspaces, heads):
        settings = {"block_size": 8, "top_k": 4, "backend": backend, "workspace_bytes": workspace}
        tensors = inputs(queries, groups, torch.float32, tokens=tokens)
        found = forward_and_backward(lambda *x, s=settings: moba_attention(*x, cu, **s), *tensors)
        yield f"workspace={workspace} heads={queries}/{groups}: {found}"


def _full() -> Iterator[str]:
    every = itertools.product(("auto", "torch"), DTYPES.items(), HEADS, PACKS.items())
    for backend, (name, dtype), (queries, groups), (pack, bounds) in every:
        cu, tensors = boundaries(bounds), inputs(queries, groups, dtype)
        found = forward_and_backward(lambda *x, b=backend, c=cu: full_attention(*x, c, backend=b), *tensors)
        yield f"{backend} {name} heads={queries}/{groups} {pack}: {found}"


def _blocks(dtypes: dict[str, torch.dtype], sizes: tuple, heads: tuple) -> Iterator[str]:
    every = itertools.product(SELECTIONS.items(), dtypes.items(), heads, PACKS.items(), sizes)
    for (selection, settings), (name, dtype), (queries, groups), (pack, bounds), (block_size, top_k) in every:
        q, k, *_ = inputs(queries, groups, dtype)
        ids = select_blocks(q, k, boundaries(bounds), block_size=block_size, top_k=top_k, **settings)
        known = f"{selection} {name} heads={queries}/{groups} {pack} B={block_size} K={top_k}"
        yield f"{known}: {describe(ids)} last {' '.join(map(str, ids[-1, 0, :6].tolist()))}"
    # Whole numbers, so that equal scores abound.
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randint(-2, 3, (TOKENS, heads, 16), generator=generator).float() for heads in (4, 2))
    for block_size, top_k in sizes:
        yield f"ties B={block_size} K={top_k}: {describe(select_blocks(q, k, block_size=block_size, top_k=top_k))}"


def _other_arguments(backend: str) -> Iterator[str]:
    cu, tensors = boundaries(PACKS["odd"]), inputs(4, 2, torch.float32)
    sizes = {"block_size": 8, "top_k": 3, "backend": backend}
    for name, settings in (("scale", {"softmax_scale": 0.7}), ("bound", {"max_seqlen": 90})):
        yield f"{name}: " + forward_and_backward(lambda *x, s=settings: moba_attention(*x, cu, **sizes, **s), *tensors)
    q, k, v, dout = tensors
    fused = torch.cat([q, k, v], dim=1).split([4, 2, 2], dim=1)
    yield f"views: {describe(moba_attention(*fused, cu, **sizes))}"
    turned = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (q, k, v)]
    yield f"turned: {describe(moba_attention(*turned, cu, **sizes))}"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield f"autocast: {describe(moba_attention(q, k, v, cu, **sizes))}"
    nothing = [x[:0] for x in tensors]
    yield "no tokens: " + forward_and_backward(lambda *x: moba_attention(*x, **sizes), *nothing)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    traced = torch.compile(lambda *x: moba_attention(*x, cu, **sizes), backend="aot_eager", fullgraph=True)(*leaves)
    yield "traced: " + describe_all(RESULTS, [traced, *torch.autograd.grad(traced, leaves, dout)])


def _continued(backend: str, dtypes: dict[str, torch.dtype], sizes: tuple) -> Iterator[str]:
    """One new token of two texts, and several of one."""
    for (name, dtype), (block_size, top_k) in itertools.product(dtypes.items(), sizes):
        q, k, v = (x.unflatten(0, (2, TOKENS // 2)) for x in inputs(4, 2, dtype)[:3])
        known = {"block_size": block_size, "top_k": top_k}
        yield f"{name} B={block_size} K={top_k}: {describe(decode_tokens(q[:, -1], k, v, backend=backend, **known))}"
        if backend == "triton":
            continue
        for new in (1, 7, 20, 50):
            found = describe(continue_text(q[0, -new:], k[0], v[0], **known))
            yield f"{name} B={block_size} K={top_k} new={new}: {found}"
