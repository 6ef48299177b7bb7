"""megatron-core's GPTModel with a loss in chunks, and with rotary embedding that restarts at every document of a pack.

Everything but the last step is the stock model. Without labels it returns logits exactly as the stock model does (of
the padded vocabulary, sharded over the tensor-parallel ranks).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moba_megatron.model.context_parallel import check_layout
from moba_megatron.model.loss import chunked_cross_entropy
from moba_megatron.model.no_gradient import without_gradient
from moba_megatron.model.rotary import RotaryFrequencies, document_rotary


class _OutputLayer(tensor_parallel.ColumnParallelLinear):
    """megatron-core's output layer without its fused weight gradient, for which it asks for apex's kernel also where
    Transformer Engine has one for all other layers. The chunked loss never calls it with gradients."""

    def __init__(self, *sizes: int, config: TransformerConfig, **settings: Any):
        config = copy.copy(config)
        config.gradient_accumulation_fusion = False
        super().__init__(*sizes, config=config, **settings)


@contextlib.contextmanager
def _output_layer_without_fusion() -> Iterator[None]:
    """GPTModel takes the class of its output layer from `megatron.core.tensor_parallel` and from nowhere else; layers
    take theirs from their specs, which are made."""
    stock = tensor_parallel.ColumnParallelLinear
    tensor_parallel.ColumnParallelLinear = _OutputLayer
    try:
        yield
    finally:
        tensor_parallel.ColumnParallelLinear = stock


class ChunkedLossGPTModel(GPTModel):
    """GPTModel that returns the loss of each token, [b, s] in fp32, without holding the logits of a long sequence.

    Args:
        loss_chunk_size: tokens per chunk of the loss.
        unpadded_vocab_size: entries of the vocabulary; `vocab_size` of the stock model may be larger, up to a multiple
            of the tensor-parallel size.
        rotary_frequencies: of the rotary embedding, in place of the stock model's `rotary_base` and its scalings.
        **stock: arguments of `GPTModel`, by name.

    Attributes:
        loss_teaches: whether anything learns from the loss; where nothing does, its gradient is 0 and not computed.

    Raises:
        ValueError: for settings that the chunked loss or the rotary embedding of documents does not serve; and in the
            forward of the first pipeline stage, for CPU tensors, if a batch is not cut for this context-parallel rank.
            On a GPU reading the positions would stall every step, so there the caller answers for them.
    """

    def __init__(
        self, *, loss_chunk_size: int, unpadded_vocab_size: int, rotary_frequencies: RotaryFrequencies, **stock: Any
    ):
        if not 1 <= unpadded_vocab_size <= stock["vocab_size"]:
            raise ValueError(
                f"unpadded_vocab_size = {unpadded_vocab_size} is not in 1 to vocab_size = {stock['vocab_size']}"
            )
        if stock.get("mtp_block_spec") is not None:
            raise ValueError("multi-token prediction is not supported with the chunked loss")
        if stock.get("position_embedding_type") != "rope":
            raise ValueError(f"position_embedding_type = {stock.get('position_embedding_type')!r}: 'rope' is supported")
        with _output_layer_without_fusion():
            super().__init__(**stock)
        self.loss_chunk_size = loss_chunk_size
        self.unpadded_vocab_size = unpadded_vocab_size
        self.loss_teaches = True
        self.rotary_pos_emb = document_rotary(
            self.config,
            rotary_frequencies,
            stock["max_sequence_length"],
            channels=self.config.kv_channels,
            cp_group=self.pg_collection.cp,
        )

    def _preprocess(self, **inputs: Any) -> Any:
        positions = inputs["position_ids"]
        if self.pre_process and positions is not None and positions.device.type == "cpu":
            check_layout(positions, inputs["packed_seq_params"], self.pg_collection.cp)
        found = super()._preprocess(**inputs)
        padding_mask = inputs.get("padding_mask")
        # megatron-core cuts the mask for sequence parallelism on the first pipeline stage alone.
        if padding_mask is None or not self.config.sequence_parallel or found[5] is not padding_mask:
            return found
        rows = padding_mask.transpose(0, 1).contiguous()
        mine = tensor_parallel.scatter_to_sequence_parallel_region(rows, group=self.pg_collection.tp)
        return (*found[:5], mine.transpose(0, 1).contiguous(), *found[6:])

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        tied = self.share_embeddings_and_output_weights
        losses = chunked_cross_entropy(
            hidden_states if self.loss_teaches else hidden_states.detach(),
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            labels,
            chunk_size=self.loss_chunk_size,
            vocab_size=self.unpadded_vocab_size,
            tp_group=self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
        )
        return losses if self.loss_teaches else without_gradient(losses, hidden_states)
