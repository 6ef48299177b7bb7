"""An index of its own: projections of a layer's hidden states that choose the blocks of its attention.

With `attention.router: index` a layer that is MoBA in some stage has index queries (one for each key head, or for each
query head) and index keys (one that all heads share, or one for each key head). They are normalised by head, and
rotated as the layer's own queries and keys. A block is represented by the mean of its index keys, and a query chooses
the blocks with the largest inner products; its own block is always attended. Attention itself is as before.

The index learns from a loss of its own, the divergence of its choice from what attention finds in the blocks
(`moba_attention` has the definition). The hidden states are detached, so it trains the index and nothing else. The loss
of a microbatch is a sum over the tokens whose loss mask is 1. It is attached to the attention's output as megatron-core
attaches the auxiliary losses of experts, and is divided in the end, with the loss of the language model, by all tokens
that count. A pass without gradients has no loss, so recomputation, whose first pass has none, counts once.

Under tensor parallelism a rank has the index queries of its own heads, and their keys, if each key head has one. What
all heads share (a shared key, the norms) is on every rank, and each rank's gradient is that of its own heads: they are
added up where the weight is used, or under sequence parallelism, which gathers the hidden states for the projections,
by megatron-core after the step.

The index's queries, its keys and the loss mask are explicit inputs of the core attention, also where it is computed
again. They live in an attribute for the length of one forward call, as the stock forward has no place for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from moba_megatron.model.core_attention import MoBASelfAttention, pack_boundaries
from moba_megatron.model.index_inputs import IndexInputs, loss_mask_of
from moba_megatron.model.key_convolution import ConvolvedKeysSelfAttention
from moba_megatron.model.no_gradient import without_gradient
from moba_megatron.model.norm import RMSNorm

NAME = "block_router"
"""Of the module in its layer, and so part of the names of its weights."""


@dataclass(frozen=True)
class RouterSettings:
    """An index as `attention.router_*` describe it.

    Attributes:
        dim: channels of a head.
        heads, keys: one query for each `key` or `query` head; one `shared` key, or one for each `key` head.
        norm: `rms` or `none`.
        loss, loss_coeff: what it learns from, and its weight.
        rotary: angles of a batch for heads of another size than the layer's (`DocumentRotaryEmbedding.for_tokens`);
            None: the layer's own are used.
    """

    dim: int
    heads: Literal["key", "query"] = "key"
    keys: Literal["shared", "key"] = "shared"
    norm: Literal["rms", "none"] = "rms"
    loss: Literal["none", "sparse", "dense"] = "sparse"
    loss_coeff: float = 1.0
    rotary: Callable[[int, PackedSeqParams | None], Tensor] | None = None


class _Projection(torch.nn.Module):
    """A weight [size, h] by name. It is zero until `index_weights` or a checkpoint fill it."""

    def __init__(self, config: TransformerConfig, size: int):
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.zeros(size, config.hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)


class BlockRouter(MegatronModule):
    """The index of one layer; see the module.

    Args:
        config: decides dtype and device.
        settings: of the index.
        layer_number: of the layer, from 1.
        query_heads, key_heads: of the layer, on this tensor-parallel rank.
        tp_group, cp_group: ranks over which heads are split, and sequences.

    Attributes:
        set_aside: let the layer's own queries and keys choose, to see what that changes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        settings: RouterSettings,
        layer_number: int,
        *,
        query_heads: int,
        key_heads: int,
        tp_group: ProcessGroup | None,
        cp_group: ProcessGroup | None,
    ):
        super().__init__(config=config)
        self.settings, self.layer_number = settings, layer_number
        self.tp_group, self.cp_group = tp_group, cp_group
        self.heads = query_heads if settings.heads == "query" else key_heads
        self.key_heads = 1 if settings.keys == "shared" else key_heads
        self.query = self._projection(self.heads, split=True)
        self.key = self._projection(self.key_heads, split=settings.keys == "key")
        norms = settings.norm == "rms"
        self.query_norm, self.key_norm = (
            RMSNorm(config, settings.dim, eps=config.layernorm_epsilon) if norms else None for _ in range(2)
        )
        self.tally: Tensor | None = None
        self.set_aside = False

    def _projection(self, heads: int, *, split: bool) -> _Projection:
        projection = _Projection(self.config, heads * self.settings.dim)
        if split:
            set_tensor_model_parallel_attributes(projection.weight, True, 0, 1)
        else:
            projection.weight.sequence_parallel = self.config.sequence_parallel
        return projection

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks."""
        return 1 if self.tp_group is None else self.tp_group.size()

    @property
    def rank(self) -> int:
        """This one among them."""
        return 0 if self.tp_group is None else self.tp_group.rank()

    def forward(
        self, hidden: Tensor, rotary_pos_emb: Any, packed_seq_params: PackedSeqParams | None
    ) -> tuple[Tensor, Tensor]:
        """Index queries [s, b, heads, dim] and keys [s, b, key heads, dim] of this context-parallel rank's tokens; of a
        pack [t, heads, dim] and [t, key heads, dim].

        Args:
            hidden: [s, b, h], normalised; under sequence parallelism this rank's part of the sequence.
            rotary_pos_emb: what megatron-core hands to the layer; None for a layer that is not rotated.
        """
        hidden = hidden.detach()
        if self.config.sequence_parallel and self.ranks > 1:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        shape = (*hidden.shape[:2], -1, self.settings.dim)
        key_weight = self._of_all_heads(self.key.weight) if self.settings.keys == "shared" else self.key.weight
        q, k = (F.linear(hidden, weight).view(shape) for weight in (self.query.weight, key_weight))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self._normalise(q, self.query_norm), self._normalise(k, self.key_norm)
        cu_seqlens = None
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            q, k, cu_seqlens = q.squeeze(1), k.squeeze(1), pack_boundaries(packed_seq_params)[0]
        if rotary_pos_emb is None:
            return q, k
        if self.settings.rotary is not None:
            rotary_pos_emb = self.settings.rotary(q.shape[0], packed_seq_params)
        q_angles, k_angles = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb, rotary_pos_emb)
        how = {
            "config": self.config,
            "cu_seqlens": cu_seqlens,
            "mscale": _yarn_get_concentration_factor_from_config(self.config),
            "cp_group": self.cp_group,
        }
        return apply_rotary_pos_emb(q, q_angles, **how), apply_rotary_pos_emb(k, k_angles, **how)

    def _normalise(self, heads: Tensor, norm: RMSNorm) -> Tensor:
        return F.rms_norm(heads, norm.normalized_shape, self._of_all_heads(norm.weight), norm.eps)

    def _of_all_heads(self, weight: Tensor) -> Tensor:
        """A weight that this rank uses for its own heads, and others for theirs. Its gradients are added up; under
        sequence parallelism megatron-core does so for every weight with its mark."""
        if self.ranks == 1 or self.config.sequence_parallel:
            return weight
        return copy_to_tensor_model_parallel_region(weight, group=self.tp_group)

    def attach(self, output: Tensor, learned: Any) -> Tensor:
        """Attach this rank's part of the loss to the attention's output, and count it.

        Args:
            learned: the `RouterLoss` of the attention, a mean over this rank's heads.
        """
        self._count(learned.loss.detach(), learned.entropy, learned.tokens)
        return MoEAuxLossAutoScaler.apply(output, learned.loss * (self.settings.loss_coeff / self.ranks))

    def _count(self, *sums: Tensor) -> None:
        new = torch.stack([value.double() for value in sums]) / self.ranks
        self.tally = new if self.tally is None else self.tally + new

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """For distributed checkpoints: split by heads, under names with the number of the layer. The stock ones are
        stacked over all layers, and a layer that is always full has no index."""
        groups = {"tp_group": self.tp_group, "dp_cp_group": ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]}
        split = {"query.weight": 0, **({"key.weight": 0} if self.settings.keys == "key" else {})}
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, split, (), **groups
        )
        if sharded_offsets:
            # The block of layers cuts off what stands before the name of the attention.
            layer, attention = prefix.split("self_attention.", 1)
            for tensor in state.values():
                rest = tensor.key.removeprefix(prefix)
                tensor.key = f"{layer}{self.layer_number - 1}.self_attention.{attention}{rest}"
        return state

    def extra_repr(self) -> str:
        return f"{self.settings}, heads={self.heads}, key_heads={self.key_heads}"


class _WithIndex:
    """A self-attention of megatron-core whose MoBA core attention chooses by a `BlockRouter`.

    Args:
        router: of the index.
        others: as for the class beside it.
    """

    def __init__(self, *args: Any, router: RouterSettings, **others: Any):
        super().__init__(*args, **others)
        self.block_router = BlockRouter(
            self.config,
            router,
            self.layer_number,
            query_heads=self.num_attention_heads_per_partition,
            key_heads=self.num_query_groups_per_partition,
            tp_group=self.pg_collection.tp,
            cp_group=self.pg_collection.cp,
        )
        self._index: IndexInputs | None = None
        self.core_attention.register_forward_pre_hook(self._give_index, with_kwargs=True)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **others: Any,
    ) -> Any:
        """As megatron-core's."""
        used = self.core_attention.attention.kind == "moba" and not self.block_router.set_aside
        self._index = self._index_of(hidden_states, rotary_pos_emb, packed_seq_params) if used else None
        learns = used and self.block_router.settings.loss != "none"
        try:
            output, bias = super().forward(
                hidden_states, *args, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params, **others
            )
        finally:
            self._index = None
        waiting = [weight for weight in self.block_router.parameters() if weight.requires_grad]
        if waiting and not learns and torch.is_grad_enabled():
            output = without_gradient(output, *waiting)
        return output, bias

    def _index_of(self, hidden: Tensor, rotary_pos_emb: Any, packed_seq_params: PackedSeqParams | None) -> IndexInputs:
        skipped = self.config.no_rope_freq[self.layer_number - 1] if self.config.no_rope_freq else False
        q, k = self.block_router(self._normed(hidden), None if skipped else rotary_pos_emb, packed_seq_params)
        router = self.block_router
        return IndexInputs(q, k, loss_mask_of(packed_seq_params), router.settings.loss, router.attach)

    def _normed(self, hidden: Tensor) -> Tensor:
        """Transformer Engine normalises within the product that follows; here it is done once more."""
        weight = getattr(self.linear_qkv, "layer_norm_weight", None)
        if weight is None:
            return hidden
        hidden = hidden.detach()
        return F.rms_norm(hidden, hidden.shape[-1:], weight.detach(), self.config.layernorm_epsilon)

    def _give_index(self, core: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The stock forward calls the core attention without it; recomputation has it at hand."""
        if self._index is None or "index" in named:
            return None
        return args, {**named, "index": self._index}

    def _checkpointed_attention_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Any = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **others: Any,
    ) -> Tensor:
        """As megatron-core's, with the index among the inputs that are kept for the second pass."""
        index = self._index
        named = {"attention_bias": attention_bias, "packed_seq_params": packed_seq_params}
        if index is None:
            return super()._checkpointed_attention_forward(
                query, key, value, attention_mask, rotary_pos_emb, attn_mask_type, **named, **others
            )
        assert not any(others.values()), "megatron-core gives other inputs to latent attention alone"
        named["attn_mask_type"] = self.attn_mask_type if attn_mask_type is None else attn_mask_type

        def attend(query: Tensor, key: Tensor, value: Tensor, *inputs: Tensor) -> Tensor:
            own = dict(zip(("query", "key", "loss_mask"), inputs, strict=True))
            return self.core_attention(query, key, value, attention_mask, index=replace(index, **own), **named)

        kept = (query, key, value, index.query, index.key, index.loss_mask)
        return tensor_parallel.checkpoint(attend, False, *kept)


class IndexedSelfAttention(_WithIndex, MoBASelfAttention):
    """megatron-core's self-attention with a `BlockRouter`."""


class IndexedConvolvedKeysSelfAttention(_WithIndex, ConvolvedKeysSelfAttention):
    """The same, with a convolution of the attention's own keys."""


def is_of_index(name: str) -> bool:
    """Whether a weight, by name, belongs to an index."""
    return f".{NAME}." in name


def block_routers(chunks: list[torch.nn.Module]) -> Iterator[BlockRouter]:
    """The indexes of model chunks, in the order of their layers."""
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, BlockRouter))


def read_index_tallies(chunks: list[torch.nn.Module], num_layers: int, device: torch.device) -> Tensor:
    """What the indexes of all ranks counted since the last call: fp64 [layers, 3], sums over tokens of the loss
    (without its weight) and of the entropy of the choice, and the tokens. Collective."""
    sums = torch.zeros(num_layers, 3, dtype=torch.float64, device=device)
    for router in block_routers(chunks):
        if router.tally is not None:
            sums[router.layer_number - 1] = router.tally
            router.tally = None
    # Each token is on one rank of a pipeline stage, or in equal parts on those that split the heads.
    torch.distributed.all_reduce(sums)
    return sums
