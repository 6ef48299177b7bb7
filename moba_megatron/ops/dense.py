"""Full causal attention of packed documents, for the full layers of a hybrid: flash-attn (2, 3 or 4) where it is
installed, and PyTorch's fused kernels.

The kernels do grouped-query attention, so keys are not repeated in memory. Exception: fp32 on CUDA, where the only
fused kernel has no groups. PyTorch's kernels attend documents one by one on a CPU. Packed bf16 and fp16 on CUDA use the
variable-length flash kernel, which reads the boundaries on the device. That kernel refuses fp32: packed fp32 on CUDA
and packs for cuDNN read the boundaries on the host.

Only kernels whose memory is linear in the tokens are allowed. PyTorch silently falls back to a kernel with the matrix
of all scores in two cases. If the last dimension is not contiguous, a copy here avoids it. If no fused kernel takes the
inputs (fp64 on CUDA), a call raises.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moba_megatron.ops.adapters import FLASH_ATTENTION, HALF, flash_attn_attention
from moba_megatron.ops.backends import resolve_full_backend
from moba_megatron.ops.layout import check_inputs
from moba_megatron.ops.precision import without_autocast

LINEAR_IN_MEMORY = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
# Which of PyTorch's kernels a backend may take.
KERNELS = {
    "torch": LINEAR_IN_MEMORY,
    "torch_flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
}


@without_autocast
def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention within each document of a pack.

    Args:
        q: queries [T, N, D], floating.
        k, v: keys and values [T, G, D], same dtype and device; N a multiple of G.
        cu_seqlens: int32 [documents + 1], boundaries from 0 to T; None for one document.
        softmax_scale: factor on the scores, 1/sqrt(D) if None.
        max_seqlen: an upper bound on the longest document in tokens; only kernels for packs on CUDA look at it.
        backend: `auto`, `torch`, `torch_flash`, `cudnn`, `flash_attn`, `flash_attn_3` or `flash_attn_4`. `auto` takes
            a version of flash-attn that is installed and takes the inputs (3 before 4 before 2), else `torch`, which
            leaves the choice among its kernels to PyTorch.

    Returns:
        [T, N, D] in q's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or boundaries that do not fit, or a backend that cannot run.
        RuntimeError: PyTorch has no kernel for these inputs but the quadratic one.
    """
    check_inputs({"q": q, "k": k, "v": v}, cu_seqlens)
    name, _ = resolve_full_backend(backend, q.device, q.dtype, q.shape[2])
    scale = 1 / math.sqrt(q.shape[2]) if softmax_scale is None else softmax_scale
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if name in FLASH_ATTENTION:
        return flash_attn_attention(q, k, v, cu_seqlens, softmax_scale=scale, max_seqlen=max_seqlen, version=name)
    kernels = KERNELS[name]
    if cu_seqlens is None or cu_seqlens.numel() == 2:
        return _one_document(q, k, v, scale, kernels)
    if _runs_packs(q, kernels):
        longest = q.shape[0] if max_seqlen is None else max_seqlen
        bounds = cu_seqlens.to(torch.int32)
        flash = torch.ops.aten._flash_attention_forward
        return flash(q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scale)[0]
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    outputs = [_one_document(*qkv, scale, kernels) for qkv in documents if qkv[0].shape[0]]
    return torch.cat(outputs) if outputs else torch.zeros_like(q)


def _runs_packs(q: Tensor, kernels: list[SDPBackend]) -> bool:
    """Whether PyTorch has a kernel for packs, the flash kernel, for these queries."""
    return q.device.type == "cuda" and q.dtype in HALF and SDPBackend.FLASH_ATTENTION in kernels


def _one_document(
    q: Tensor, k: Tensor, v: Tensor, scale: float, kernels: list[SDPBackend] = LINEAR_IN_MEMORY
) -> Tensor:
    if q.shape[0] == 0:
        return torch.zeros_like(q)
    if q.shape[0] == 1:  # attends itself alone, which cuDNN refuses to compute
        return (v + 0 * k).repeat_interleave(q.shape[1] // v.shape[1], dim=1) + 0 * q
    grouped = q.shape[1] != k.shape[1]
    if grouped and not takes_groups(q.device, q.dtype):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    with sdpa_kernel(kernels):
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


def takes_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a fused kernel of PyTorch takes fewer kv heads than query heads. On CUDA fp32 has the memory-efficient
    one alone, which does not."""
    return device.type != "cuda" or dtype in HALF
