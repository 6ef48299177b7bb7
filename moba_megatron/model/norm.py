"""RMSNorm for layers without Transformer Engine (arXiv 1910.07467).

megatron-core's own local norms refuse sequence parallelism, because PyTorch's modules do not mark their weights. Under
sequence parallelism each tensor-parallel rank normalises a part of the tokens, so the weight's gradients must be summed
over those ranks; megatron-core does that for every weight marked `sequence_parallel`.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Normalise the last dimension by its root mean square and scale it by a weight.

    Args:
        config: decides dtype and the sequence-parallel mark.
        hidden_size: size of the last dimension.
        eps: added to the mean square.

    Raises:
        ValueError: if weights are to be counted from 1 (`layernorm_zero_centered_gamma`).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        if config.layernorm_zero_centered_gamma:
            raise ValueError(
                "layernorm_zero_centered_gamma = True (weights counted from 1) is not what local RMSNorm computes: set "
                "it to False, or use Transformer Engine"
            )
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
