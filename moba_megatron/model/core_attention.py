"""MoBA as a core attention of megatron-core: the module between rotary embedding and output projection.

megatron-core builds it through `SelfAttentionSubmodules.core_attention` and calls it with queries `[sq, b, np, hn]` and
keys and values `[sk, b, ng, hn]` (b sequences of one length), or with a pack of documents, `[t, np, hn]` and
`[t, ng, hn]`, whose boundaries are in `PackedSeqParams`. Head counts are read from the tensors, so tensor parallelism
and grouped queries need nothing here: each rank attends with its own heads, and keys are never repeated.

The module has no parameters. What it computes is the attribute `attention`, which may change between steps
(`set_attention_stage`): block-sparse or full attention over the same projections. It has no other state, so activation
recomputation, which runs it twice, is exact.

Sequences of a batch are laid end to end, as documents of one pack. At b = 1 that is a view; otherwise one copy each of
queries, keys and values.

Under context parallelism the tokens are this rank's zigzag shard of each sequence or document (`parallel.layout`), the
boundaries are those of the whole pack, padded, and `parallel.attention` does the work over the groups that
megatron-core hands over. How its ranks exchange is a parameter of ours, one for each kind of layer; the layer's own
`cp_comm_type` has fewer choices and is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moba_megatron.model.context_parallel import ContextParallel
from moba_megatron.model.index_inputs import IndexInputs
from moba_megatron.model.schedule import AttentionSchedule, LayerAttention
from moba_megatron.ops import full_attention, moba_attention
from moba_megatron.ops.kept_layouts import equal_boundaries
from moba_megatron.parallel.attention import ContextGroups

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class MoBACoreAttention(MegatronModule):
    """Block-sparse (or, in full layers, plain causal) attention behind megatron-core's core attention contract.

    Args:
        config, layer_number, attn_mask_type, attention_type, attention_dropout, softmax_scale, cp_comm_type,
            pg_collection: as megatron-core passes them to every core attention. `layer_number` counts from 1 over all
            pipeline stages. `softmax_scale` defaults to 1 / sqrt(head size).
        attention: how this layer attends.
        backend: what computes MoBA, see `moba_attention`.
        full_backend: what computes full attention, see `full_attention`. Only `auto` under context parallelism, where
            full layers run through the exchanges.
        exchange: what context-parallel ranks do, `auto` or a name of `parallel.exchanges`: one for both kinds, or
            `{"moba": ..., "full": ...}`. `auto` is decided at the first call, from the sizes of its tensors.
        workspace_bytes: of MoBA, see `moba_attention`; under context parallelism of every layer.

    Raises:
        ValueError: for settings that are not MoBA: dropout in attention, a mask that is not causal, cross attention, a
            window, softmax offsets, latent attention, fp8 in attention; for an unknown exchange; for the reference
            backend under context parallelism with another exchange than `a2a`; and for a full-attention backend asked
            for by name under context parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        attention: LayerAttention,
        backend: str = "auto",
        full_backend: str = "auto",
        exchange: str | Mapping[str, str] = "auto",
        workspace_bytes: int | None = None,
    ):
        super().__init__(config=config)
        if full_backend != "auto" and config.context_parallel_size > 1:
            raise ValueError(
                f"full_backend = {full_backend!r} with context_parallel_size = {config.context_parallel_size}: there "
                f"full layers use the exchanges; use auto"
            )
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        _refuse_what_is_not_moba(config, layer_number, attn_mask_type, attention_type, dropout)
        _check_budgets(config, layer_number, attention)
        self.context = ContextParallel(config, pg_collection, exchange, backend, workspace_bytes)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.attention = attention
        self._tensor_rank = _tensor_rank(config, pg_collection)
        self.backend = backend
        self.full_backend = full_backend
        self.workspace_bytes = workspace_bytes

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        index: IndexInputs | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [sq, b, np, hn], or [t, np, hn] with `packed_seq_params`; under context parallelism sq and t count
                this rank's tokens.
            key, value: [sk, b, ng, hn] with sk = sq, or [t, ng, hn]; np a multiple of ng; all of one dtype.
            attention_mask: must be None: the mask is causal within each sequence or document.
            packed_seq_params: boundaries of the documents of a pack, in tokens (`qkv_format` "thd"). Padded boundaries
                win where they are given: padding follows its document's tokens, which therefore never attend to it.
                Under context parallelism they are those of the whole pack. `cp_group`, if set, wins over the layer's
                group.
            index: what chooses the blocks in place of query and key, see `model.block_router`.

        Returns:
            [sq, b, np * hn], or [t, np * hn] for a pack, in the dtype of `query`.

        Raises:
            ValueError: for a mask, a bias, keys that are not those of the queries' tokens (decoding with a cache), or
                an index that learns without a loss mask.
        """
        self._check_call(query, key, attention_mask, attn_mask_type, attention_bias)
        cp_groups = self.context.cp_groups(packed_seq_params)
        if packed_seq_params is not None and packed_seq_params.qkv_format != "sbhd":
            cu_seqlens, max_seqlen = pack_boundaries(packed_seq_params)
            return self._attend(query, key, value, cu_seqlens, max_seqlen, cp_groups, index).flatten(1)
        local_length, batch = query.shape[:2]
        length = local_length * (cp_groups.whole.size() if cp_groups else 1)
        if index is not None:
            index = replace(index, query=_end_to_end(index.query), key=_end_to_end(index.key))
        # Context parallelism reads boundaries on the host.
        boundaries = None
        if batch > 1:
            boundaries = equal_boundaries(batch, length, torch.device("cpu") if cp_groups else query.device)
        packed = (_end_to_end(tensor) for tensor in (query, key, value))
        output = self._attend(*packed, boundaries, length, cp_groups, index)
        if batch == 1:
            return output.flatten(1).unsqueeze(1)
        return output.view(batch, local_length, -1).transpose(0, 1).contiguous()

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cp_groups: ContextGroups | None,
        index: IndexInputs | None,
    ) -> Tensor:
        attention = self.attention_of_rank(k.shape[1])
        if cp_groups is not None:
            return self.context.attend(
                attention, q, k, v, cu_seqlens, cp_groups=cp_groups, softmax_scale=self.softmax_scale, index=index
            )
        common = {"softmax_scale": self.softmax_scale, "max_seqlen": max_seqlen}
        if attention.kind == "full":
            return full_attention(q, k, v, cu_seqlens, backend=self.full_backend, **common)
        sizes = {"block_size": attention.block_size, "top_k": attention.blocks}
        how = {"backend": self.backend, "workspace_bytes": self.workspace_bytes, **attention.selection.settings}
        if index is None:
            return moba_attention(q, k, v, cu_seqlens, **sizes, **how, **common)
        router = index.as_router()
        return index.learned(moba_attention(q, k, v, cu_seqlens, router=router, **sizes, **how, **common), router)

    def attention_of_rank(self, kv_heads: int) -> LayerAttention:
        """How the key heads of this tensor-parallel rank attend; `kv_heads` of them."""
        budgets = self.attention.selection.budgets
        if budgets is None:
            return self.attention
        # With more ranks than key heads, several have the same one.
        first = self._tensor_rank * len(budgets) // max(1, self.config.tensor_model_parallel_size)
        return self.attention.of_heads(first, kv_heads)

    def _check_call(self, query, key, attention_mask, attn_mask_type, attention_bias) -> None:
        if attention_bias is not None:
            raise ValueError("attention_bias is not MoBA: pass None")
        if attention_mask is not None:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: MoBA is always causal; pass None, "
                "and give document boundaries as PackedSeqParams"
            )
        if attn_mask_type is not None and attn_mask_type not in CAUSAL:
            raise ValueError(f"attn_mask_type {attn_mask_type} is not causal: MoBA is causal self-attention")
        if query.shape[0] != key.shape[0]:
            raise ValueError(
                f"{query.shape[0]} queries and {key.shape[0]} keys: this core attention needs queries and keys of the "
                f"same tokens; it does not support a key/value cache"
            )

    def extra_repr(self) -> str:
        backends = f"backend={self.backend}, full_backend={self.full_backend}"
        return f"layer_number={self.layer_number}, attention={self.attention}, {backends}, {self.context}"


def _end_to_end(rows: Tensor) -> Tensor:
    """Sequences [s, b, heads, size] one after the other, [b * s, heads, size]."""
    return rows[:, 0] if rows.shape[1] == 1 else rows.transpose(0, 1).flatten(0, 1)


class MoBASelfAttention(SelfAttention):
    """megatron-core's self-attention around a MoBA core attention: what would go past it raises.

    megatron-core's own inference calls kernels of flash-attn for its caches, and not the core attention.
    """

    def flash_decode(self, *args, **others):
        raise ValueError(_NO_INFERENCE)

    def flash_decode_and_prefill(self, *args, **others):
        raise ValueError(_NO_INFERENCE)


_NO_INFERENCE = (
    "megatron-core's inference engine bypasses MoBA and attends fully: generate by `moba-megatron generate` or from "
    "an export "
    "to Hugging Face format"
)


def set_attention_stage(model_chunks: list[torch.nn.Module], schedule: AttentionSchedule, stage: int) -> int:
    """Let every MoBA core attention of these model chunks attend as in this stage of the schedule.

    Args:
        model_chunks: what this pipeline rank holds, wrapped (DDP) or not.
        stage: counted from 0, see `AttentionSchedule.stage_at`.

    Returns:
        the number of layers whose attention changed.

    Raises:
        ValueError: if the schedule has another stage or layer count than asked for, or the stage makes a layer MoBA
            that was built with another core attention. Nothing has changed then.
    """
    if not 0 <= stage < len(schedule.stages):
        raise ValueError(f"stage {stage} is not one of 0 to {len(schedule.stages) - 1}")
    modules = [module for chunk in model_chunks for module in chunk.modules()]
    layers = schedule.stages[stage]
    for module in modules:
        if isinstance(module, (MoBACoreAttention, SelfAttention)) and module.layer_number > schedule.num_layers:
            raise ValueError(f"layer {module.layer_number}, but the schedule has {schedule.num_layers} layers")
        if isinstance(module, SelfAttention) and not isinstance(module.core_attention, MoBACoreAttention):
            if layers[module.layer_number - 1].kind == "moba":
                raise ValueError(
                    f"layer {module.layer_number} is MoBA in stage {stage}, but was built with "
                    f"{type(module.core_attention).__name__}, full attention: build the model for this schedule"
                )
    cores = [module for module in modules if isinstance(module, MoBACoreAttention)]
    for core in cores:
        _check_budgets(core.config, core.layer_number, layers[core.layer_number - 1])
    changed = sum(core.attention != layers[core.layer_number - 1] for core in cores)
    for core in cores:
        core.attention = layers[core.layer_number - 1]
    return changed


def _check_budgets(config: TransformerConfig, layer: int, attention: LayerAttention) -> None:
    budgets, kv_heads = attention.selection.budgets, config.num_query_groups or config.num_attention_heads
    if budgets is not None and len(budgets) != kv_heads:
        raise ValueError(
            f"layer {layer}: top_k = {list(budgets)} has {len(budgets)} entries for {kv_heads} key heads: give one each"
        )


def _tensor_rank(config: TransformerConfig, pg_collection: ProcessGroupCollection | None) -> int:
    if config.tensor_model_parallel_size == 1:
        return 0
    group = getattr(pg_collection, "tp", None)
    return parallel_state.get_tensor_model_parallel_rank() if group is None else group.rank()


def pack_boundaries(packed: PackedSeqParams) -> tuple[Tensor, int | None]:
    """(cu_seqlens [documents + 1] int32, longest document or None if not known) of a pack of documents."""
    if packed.qkv_format != "thd":
        raise ValueError(f"PackedSeqParams.qkv_format = {packed.qkv_format!r}: packs of documents need 'thd'")
    cu_q = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    cu_kv = packed.cu_seqlens_kv if packed.cu_seqlens_kv_padded is None else packed.cu_seqlens_kv_padded
    if cu_q is None:
        raise ValueError("PackedSeqParams without cu_seqlens_q: the boundaries of the documents are missing")
    # Values are compared on the CPU only: reading them from a GPU would stall it at every layer.
    differ = cu_kv is not None and cu_kv is not cu_q and (
        cu_kv.shape != cu_q.shape or (cu_q.device.type == "cpu" and not torch.equal(cu_q, cu_kv))
    )  # fmt: skip
    if differ:
        raise ValueError("PackedSeqParams: cu_seqlens_q and cu_seqlens_kv differ, but MoBA is self-attention")
    # Beside padded boundaries, max_seqlen_q may be the longest document without its padding, which is no bound here.
    return cu_q, packed.max_seqlen_q if packed.cu_seqlens_q_padded is None else None


def _refuse_what_is_not_moba(
    config: TransformerConfig, layer: int, mask_type: AttnMaskType, attention_type: str, dropout: float
) -> None:
    fp8 = config.fp8_dot_product_attention or config.fp8_multi_head_attention
    checks = [
        (dropout > 0, f"attention_dropout = {dropout} is not MoBA: set it to 0.0"),
        (mask_type not in CAUSAL, f"attn_mask_type = {mask_type} is not causal: use AttnMaskType.causal"),
        (attention_type != "self", f"attention_type = {attention_type!r}: MoBA is self-attention"),
        (config.window_size is not None, f"window_size = {config.window_size} is not MoBA: set it to None"),
        (
            config.softmax_type != "vanilla",
            f"softmax_type = {config.softmax_type!r} (a softmax offset) is not MoBA: set it to 'vanilla'",
        ),
        (config.multi_latent_attention, "multi_latent_attention = True is not supported by MoBA: set it to False"),
        (
            getattr(config, "qk_clip", False) or getattr(config, "log_max_attention_logit", False),
            "qk_clip and log_max_attention_logit need the largest score of every head, which MoBA does not keep: set "
            "both to False",
        ),
        (fp8, "fp8 attention is not supported by MoBA: unset fp8_dot_product_attention and fp8_multi_head_attention"),
    ]
    problems = [text for wrong, text in checks if wrong]
    if problems:
        raise ValueError(f"layer {layer} cannot use MoBA: " + "; ".join(problems))
