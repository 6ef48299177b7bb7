"""Inputs and tolerances shared by the tests of the kernels."""

from __future__ import annotations

import os

import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1: these tests run in Triton's interpreter"


def inputs(num_tokens, num_heads, num_kv_heads, size=16, dtype=torch.float32, seed=0):
    """Random q, k, v and do."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, heads, size) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def whole_numbers(num_tokens, num_heads, num_kv_heads, size=16, dtype=torch.float32, seed=0):
    """Random q and k of small integers: with blocks of a power of two every score is exact, and ties abound."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, heads, size) for heads in (num_heads, num_kv_heads)]
    return [torch.randint(-2, 3, shape, generator=generator).to(dtype) for shape in shapes]


def cu(bounds):
    return torch.tensor(bounds, dtype=torch.int32)


def results(attention, q, k, v, do):
    """Output and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, do.to(out.dtype))]


def assert_as_good(got, want, plain, dtype):
    """Against fp64: no more than the error of plain PyTorch in the same dtype, and rounding."""
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, want, plain, strict=True):
        assert a.dtype == dtype and b.abs().max() > 0
        # In fp32 the kernels' own steps count as well: scores in base 2, one online softmax per kv block, combined.
        factor, units = (2, 8) if dtype == torch.float32 else (1, 1)
        rounding = units * torch.finfo(dtype).eps * float(b.abs().max())
        error, allowed = float((a - b).abs().max()), factor * float((c - b).abs().max()) + rounding
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"
