"""FlashMoBA's key convolution (arXiv 2511.11571): keys that know their neighbours make blocks easier to tell apart.

Every channel of every key head has its own filter over the last few tokens,

    k'_t = k_t + SiLU(w_0 k_t + w_1 k_(t-1) + ... + w_(W-1) k_(t-W+1)),

in which tokens of other documents, and those before the first one, count as zero. It takes the keys after the
projection (and the norm of keys, if there is one) and before rotary embedding. Rotated neighbours have different
angles, so their sum would depend on positions. Attention gets the new keys; nothing else changes.

The filters start at zero and then leave the keys unchanged. So a model with filters starts like one without, and
`model.init_from` may name plain Hugging Face weights. It may not name a run or checkpoint without filters: export that
first, and start from the export. Every layer has the filters as a parameter, `self_attention.key_convolution.weight`,
also full layers, because a layer may change its attention between stages.

Sums are in fp32 or wider. Only the keys are kept for the backward pass. Intermediate results are several times as large
and cheap to compute again.

Under tensor parallelism a rank has the filters of its key heads. Under context parallelism the ranks of a sequence
gather the last W - 1 tokens of each other's chunks (`parallel.halo`), and gradients go back the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from moba_megatron.model.core_attention import MoBASelfAttention, pack_boundaries
from moba_megatron.ops.precision import score_dtype
from moba_megatron.ops.upload import upload
from moba_megatron.parallel.context_plan import host_boundaries
from moba_megatron.parallel.halo import edge_rows, previous_in_pack, previous_rows

WIDTHS = (3, 5)


class KeyConvolution(MegatronModule):
    """The convolution of one layer's keys; see the module.

    Args:
        config: decides dtype and device.
        width: tokens that a filter reads, the newest one counted.
        key_heads: key heads of this tensor-parallel rank.
        head_size: channels of a key head.
        tp_group: ranks over which key heads are split.

    Raises:
        ValueError: another width than 3 or 5.
    """

    def __init__(
        self, config: TransformerConfig, width: int, key_heads: int, head_size: int, tp_group: ProcessGroup | None
    ):
        super().__init__(config=config)
        if width not in WIDTHS:
            raise ValueError(f"a key convolution of width {width}: use {' or '.join(map(str, WIDTHS))}")
        self.width, self.shape, self.tp_group = width, (key_heads, head_size), tp_group
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.zeros(key_heads * head_size, width, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, key: Tensor, packed_seq_params: PackedSeqParams | None, cp_group: ProcessGroup | None) -> Tensor:
        """Keys [s, b, ng, hn] of this rank's tokens -> keys of the same shape.

        Args:
            packed_seq_params: boundaries of the documents where b = 1 is a pack of them.
            cp_group: ranks that share each sequence; `packed_seq_params.cp_group`, if set, wins.
        """
        packed = packed_seq_params is not None and packed_seq_params.qkv_format != "sbhd"
        boundaries = pack_boundaries(packed_seq_params)[0] if packed else None
        if packed_seq_params is not None and packed_seq_params.cp_group is not None:
            cp_group = packed_seq_params.cp_group
        source, rows = self._with_neighbours(key, boundaries, cp_group)
        filters = self.weight.view(*self.shape, self.width)
        return checkpoint(_convolve, source, rows, filters, use_reentrant=False, preserve_rng_state=False)

    def _with_neighbours(
        self, key: Tensor, boundaries: Tensor | None, cp_group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        """Keys at hand, those of other ranks included, and the rows among them of the tokens before each token."""
        reach = self.width - 1
        if cp_group is None or cp_group.size() == 1:
            return key, previous_in_pack(key.shape[0], boundaries, reach, key.device)
        size, rank = cp_group.size(), cp_group.rank()
        whole = (0, key.shape[0] * size) if boundaries is None else host_boundaries(boundaries)
        edges = key.index_select(0, upload(edge_rows(whole, size, reach), key.device))
        edges = gather_from_sequence_parallel_region(edges, group=cp_group)
        return torch.cat([key, edges]), upload(previous_rows(whole, size, rank, reach), key.device)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """For distributed checkpoints: split by key heads."""
        groups = {"tp_group": self.tp_group, "dp_cp_group": ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)

    def extra_repr(self) -> str:
        return f"width={self.width}, key_heads={self.shape[0]}, head_size={self.shape[1]}"


def _convolve(source: Tensor, rows: Tensor, filters: Tensor) -> Tensor:
    """Convolved keys [s, b, ng, hn].

    Args:
        source: [s or more, b, ng, hn], keys of the s tokens and then of others.
        rows: int64 [width - 1, s], see `parallel.halo`.
        filters: [ng, hn, width].
    """
    key, dtype = source[: rows.shape[1]], score_dtype(source.dtype)
    mixed = key * filters[..., 0].to(dtype)
    for back, row in enumerate(rows, start=1):
        outside = (row < 0).view(-1, 1, 1, 1)
        before = source.index_select(0, row.clamp(min=0)).masked_fill_(outside, 0)
        mixed = mixed + before * filters[..., back].to(dtype)
    return key + torch.nn.functional.silu(mixed).to(key.dtype)


class ConvolvedKeysSelfAttention(MoBASelfAttention):
    """megatron-core's self-attention with a `KeyConvolution` between its projection and rotary embedding.

    Args:
        key_convolution: width of the convolution.
        others: as for megatron-core's `SelfAttention`.
    """

    def __init__(self, *args: Any, key_convolution: int, **others: Any):
        super().__init__(*args, **others)
        heads, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        self.key_convolution = KeyConvolution(self.config, key_convolution, heads, size, self.pg_collection.tp)
        self._packed_seq_params: PackedSeqParams | None = None

    def forward(self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **others: Any) -> Any:
        """As megatron-core's; the projection below, which the stock forward calls, is not told the boundaries."""
        self._packed_seq_params = packed_seq_params
        try:
            return super().forward(*args, packed_seq_params=packed_seq_params, **others)
        finally:
            self._packed_seq_params = None

    def get_query_key_value_tensors(self, *args: Any, **others: Any) -> Any:
        """(query, key, value, and the gate if there is one), keys convolved."""
        query, key, *rest = super().get_query_key_value_tensors(*args, **others)
        return query, self.key_convolution(key, self._packed_seq_params, self.pg_collection.cp), *rest
