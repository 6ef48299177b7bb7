"""Continuing texts, for generation: `continue_text` takes many new tokens of one text, in portable PyTorch;
`decode_tokens` one new token of several texts of one length, by the GPU kernels where they run.

The result is exactly what one pass over the whole text gives for these tokens.

Legend: b texts, S tokens of a text, N query heads, G kv heads, D head size, M complete blocks of a text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moba_megatron.ops.backends import resolve_backend
from moba_megatron.ops.gathered.decode import block_means, block_summaries, choosing, continue_text
from moba_megatron.ops.layout import check_settings
from moba_megatron.ops.selection import MOBA, Selection

__all__ = ["block_means", "block_summaries", "continue_text", "decode_tokens"]


@torch.no_grad()
def decode_tokens(
    q_bND: Tensor,
    k_bSGD: Tensor,
    v_bSGD: Tensor,
    summaries_bMGD: Tensor | None = None,
    *,
    block_size: int,
    top_k: int | Sequence[int],
    softmax_scale: float | None = None,
    backend: str = "auto",
    selection: Selection = MOBA,
    router_q_bHC: Tensor | None = None,
    router_k_bSJC: Tensor | None = None,
) -> Tensor:
    """MoBA for the newest token of each of several texts of one length; no gradient.

    Args:
        q_bND: queries [b, N, D] of the last tokens.
        k_bSGD, v_bSGD: keys and values [b, S, G, D] of the whole texts; any strides.
        summaries_bMGD: as for `continue_text`; there may be room for more blocks behind them.
        top_k: as for `moba_attention`.
        backend: as for `moba_attention`, `triton` or portable. The kernel knows top-k of the means alone: any other
            selection is portable on every device.
        selection: how past blocks are chosen.
        router_q_bHC, router_k_bSJC: what chooses in place of q and k, see `continue_text`.

    Returns:
        [b, N, D] in q's dtype.

    Raises:
        ValueError: as `continue_text`, or a backend that cannot run or does not take these sizes.
    """
    top_k, selection = selection.with_blocks(top_k, k_bSGD.shape[2])
    check_settings(block_size, top_k)
    if resolve_backend(backend, q_bND.device, q_bND.dtype)[0] == "triton" and selection.with_one_budget.is_plain:
        from moba_megatron.ops.triton.decode import decode_cached

        scale = 1 / math.sqrt(q_bND.shape[2]) if softmax_scale is None else softmax_scale
        if router_q_bHC is not None:
            keys = None if router_k_bSJC is None else router_k_bSJC[0, :1].expand(k_bSGD.shape[1], -1, -1)
            given = None if summaries_bMGD is None else summaries_bMGD[0]
            choosing(q_bND, k_bSGD[0], given, selection, router_q_bHC, keys)
        if summaries_bMGD is None:
            chooses = k_bSGD if router_k_bSJC is None else router_k_bSJC
            summaries_bMGD = torch.stack([block_means(k_SGD, block_size) for k_SGD in chooses])
        lengths_b = torch.full((len(q_bND),), k_bSGD.shape[1], dtype=torch.int32, device=q_bND.device)
        settings = {"block_size": block_size, "top_k": top_k, "softmax_scale": scale, "selection": selection}
        return decode_cached(q_bND, k_bSGD, v_bSGD, summaries_bMGD, lengths_b, router_q_bHC=router_q_bHC, **settings)
    settings = {"block_size": block_size, "top_k": top_k, "softmax_scale": softmax_scale, "selection": selection}
    blocks = k_bSGD.shape[1] // block_size
    summaries = [None] * len(q_bND) if summaries_bMGD is None else summaries_bMGD[:, :blocks]
    router_q = [None] * len(q_bND) if router_q_bHC is None else router_q_bHC.unsqueeze(1)
    router_k = [None] * len(q_bND) if router_k_bSJC is None else router_k_bSJC
    texts = zip(q_bND.unsqueeze(1), k_bSGD, v_bSGD, summaries, router_q, router_k, strict=True)
    return torch.cat([
        continue_text(q, k, v, s, router_q_tHC=rq, router_k_SJC=rk, **settings) for q, k, v, s, rq, rk in texts
    ])  # fmt: skip
