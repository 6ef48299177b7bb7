"""Rotary frequencies of a configuration, and the embedding that uses them.

A pair of channels turns by an angle of position x frequency. megatron-core supports powers of a base, with
interpolation of positions and Llama 3.1's constants; published checkpoints need more. So the frequencies are computed
here and given to megatron-core's embedding. The order of operations is that of transformers, or angles at position
100,000 would differ by hundredths.

`longrope` has one set of frequencies for short sequences and one for long ones. A batch of whole sequences takes the
set for its length, as transformers does. A pack of documents always takes the set for the model's sequence length, so
all steps of a training use the same set.

megatron-core's own rotation of a pack, where it is not fused, reads the boundaries on the host and walks over the
documents, for queries and for keys, in every layer. So this embedding gives it the cosines and sines of a pack's tokens
instead of a table: gathered on the device, once a microbatch. What megatron-core does with them is the row "rotation of
packs" of `platform.differences`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from moba_megatron.config import ModelConfig
from moba_megatron.platform.differences import ROTATION_OF_PACKS, applied


@dataclass(frozen=True)
class RotaryFrequencies:
    """Radians per token of each pair of rotated channels: [pairs] fp32 on the CPU.

    Attributes:
        short, long: for sequences of up to `original_length` tokens and for longer ones; the same where there is no
            difference.
    """

    short: Tensor
    long: Tensor
    original_length: int

    @property
    def depend_on_length(self) -> bool:
        return not torch.equal(self.short, self.long)


def rotary_frequencies(model: ModelConfig) -> RotaryFrequencies:
    """The frequencies that a `model` section asks for."""
    channels = model.rotary_channels
    exponents = torch.arange(0, channels, 2, dtype=torch.int64, device="cpu").float() / channels
    powers = model.rotary_base**exponents
    short = long = 1.0 / powers
    if model.rotary_scaling == "linear":
        short = long = short / model.rotary_scaling_factor
    elif model.rotary_scaling == "llama3":
        short = long = _llama3(short, model)
    elif model.rotary_scaling == "yarn":
        short = long = _yarn(powers, model)
    elif model.rotary_scaling == "longrope":
        short, long = (
            1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * powers)
            for factors in (model.rotary_short_factors, model.rotary_long_factors)
        )
    scale = model.rotary_interpolation
    return RotaryFrequencies(short / scale, long / scale, model.rotary_original_length)


def softmax_scale(model: ModelConfig) -> float | None:
    """Scale of the scores where it is not 1 / sqrt(head size): the factor of longrope and yarn on queries and keys,
    where all of their channels have it in all layers. Otherwise it is `cosine_factor`."""
    factor = model.attention_factor
    return factor**2 / math.sqrt(model.head_size) if factor != 1.0 and model.rotates_everything else None


def cosine_factor(model: ModelConfig) -> float:
    """What cosines and sines are multiplied by: the factor of longrope and yarn, where channels or layers that are not
    rotated go without it."""
    return 1.0 if model.rotates_everything else model.attention_factor


def set_cosine_factor(transformer: TransformerConfig, factor: float) -> None:
    """Let megatron-core multiply cosines and sines by a factor.

    It knows that of YaRN only, which it computes of three attributes as (0.1 m ln(s) + 1) / (0.1 a ln(s) + 1); with
    s = e^10, m = factor - 1 and a = 0 that is the factor. Fused rotation leaves it out, without a word for packs.
    """
    if factor == 1.0:
        return
    if transformer.apply_rope_fusion:
        raise ValueError(f"a factor of {factor} on cosines and sines: set apply_rope_fusion to False")
    names = ("yarn_rotary_scaling_factor", "yarn_mscale", "yarn_mscale_all_dim")
    for name, value in zip(names, (math.exp(10), factor - 1, 0.0), strict=True):
        setattr(transformer, name, value)


def has_cosine_factor(transformer: TransformerConfig) -> bool:
    return hasattr(transformer, "yarn_mscale")


def _llama3(frequencies: Tensor, model: ModelConfig) -> Tensor:
    """Divide long waves by the factor, keep short ones, and blend linearly (in the frequency) in between."""
    low, high, length = model.rotary_low_freq_factor, model.rotary_high_freq_factor, model.rotary_original_length
    waves = 2 * math.pi / frequencies
    kept = ((length / waves - low) / (high - low)).clamp(0, 1)
    blended = (1 - kept) * frequencies / model.rotary_scaling_factor + kept * frequencies
    slow = torch.where(waves > length / low, frequencies / model.rotary_scaling_factor, blended)
    return torch.where(waves < length / high, frequencies, slow)


def _yarn(powers: Tensor, model: ModelConfig) -> Tensor:
    """Divide the slow channels by the factor, keep the fast ones, and blend linearly (in the channel) in between.

    Args:
        powers: of the base, [pairs] in fp32.
    """
    size, length = 2 * len(powers), model.rotary_original_length

    def channel(turns: float) -> float:
        """The pair of channels that turns so often within the original length."""
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(model.rotary_base))

    low, high = channel(model.rotary_beta_fast), channel(model.rotary_beta_slow)
    if model.rotary_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    slow = ((torch.arange(len(powers), dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    kept = 1 - slow
    return 1.0 / (model.rotary_scaling_factor * powers) * (1 - kept) + 1.0 / powers * kept


class DocumentRotaryEmbedding(RotaryEmbedding):
    """megatron-core's rotary embedding with given frequencies, whose table is longer than the pack.

    For packs, megatron-core takes the length of the table from `max_seqlen_q`: it computes and keeps one table for each
    longest document it meets, and when the table happens to be as long as the pack, positions run on through it instead
    of starting anew at each document. Scores only depend on distances, but their rounding then grows with the position.
    A table longer than the pack avoids the latter. Packs differ in length where documents are padded, so the length is
    rounded up to one of a few (eight between a power of two and the next): a handful of tables serves all packs.

    Args:
        frequencies: what `rotary_frequencies` gives.
        sequence_length: tokens of a sample, which decides for packs between short and long frequencies.
        fused: whether megatron-core rotates by Transformer Engine's kernel, which takes the table and the boundaries.
        dtype: of a pack's cosines and sines: that of queries and keys, or fp32 where they are still to be multiplied.
        **stock: arguments of `RotaryEmbedding`, by name.
    """

    def __init__(
        self, frequencies: RotaryFrequencies, sequence_length: int, *, fused: bool, dtype: torch.dtype, **stock: Any
    ):
        # It is for the frequencies that are replaced, whose number says how many channels are rotated.
        super().__init__(rotary_percent=1.0, **stock)
        self.fused, self.dtype = fused, dtype
        self._pack: tuple[Tensor, int] | None = None
        self.inv_freq = frequencies.short.to(self.inv_freq.device)
        self.original_length, self.sequence_length = frequencies.original_length, sequence_length
        self.beyond: RotaryEmbedding | None = None
        if frequencies.depend_on_length:
            self.beyond = RotaryEmbedding(rotary_percent=1.0, **stock)
            self.beyond.inv_freq = frequencies.long.to(self.inv_freq.device)

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """Angles as megatron-core's embedding gives them, from the frequencies for this length (tokens over all
        context-parallel ranks): [s, 1, 1, d] in fp32. For a pack that is not rotated by a fused kernel: cosines and
        sines of this rank's tokens, [t, 2, 1, d]. d counts the rotated channels.

        Raises:
            RuntimeError: for a pack, where megatron-core would take them for angles (`platform.apply` was not called).
        """
        length = self.sequence_length if packed_seq else max_seq_len
        if self.beyond is not None and length > self.original_length:
            table = self.beyond(max_seq_len, offset, packed_seq, cp_group)
        else:
            table = super().forward(max_seq_len, offset, packed_seq, cp_group)
        if not packed_seq or self.fused:
            return table
        assert self._pack is not None, "get_rotary_seq_len is called first"
        if ROTATION_OF_PACKS not in applied():
            raise RuntimeError("packs need megatron-core's rotation replaced: call moba_megatron.platform.apply first")
        cu_seqlens, tokens = self._pack
        group = self.cp_group if cp_group is None else cp_group
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        angles = table.index_select(0, packed_positions(cu_seqlens.to(table.device), tokens // size, size, rank))
        return torch.cat([angles.cos(), angles.sin()], dim=1).to(self.dtype)

    def get_rotary_seq_len(
        self, inference_context, transformer, transformer_input, transformer_config, packed_seq_params=None, **kwargs
    ) -> int:
        """As in megatron-core, in tokens over all context-parallel ranks; for a pack, more than its tokens."""
        pack = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        sequences = packed_seq_params is not None and packed_seq_params.qkv_format == "sbhd"
        length = super().get_rotary_seq_len(
            inference_context,
            transformer,
            transformer_input,
            transformer_config,
            None if pack or sequences else packed_seq_params,
            **kwargs,
        )
        if not pack:
            return length
        return self._of_pack(packed_seq_params, length)

    def _of_pack(self, packed_seq_params: PackedSeqParams, tokens: int) -> int:
        padded = packed_seq_params.cu_seqlens_q_padded
        self._pack = (packed_seq_params.cu_seqlens_q if padded is None else padded), tokens
        return table_length(tokens)

    def for_tokens(self, tokens: int, packed_seq_params: PackedSeqParams | None) -> Tensor:
        """What `forward` gives for a batch of which this context-parallel rank has `tokens` rows; to be called where
        megatron-core's model does not ask for the length first."""
        pack = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        group = None if packed_seq_params is None else packed_seq_params.cp_group
        group = self.cp_group if group is None else group
        length = tokens * (1 if group is None else group.size())
        if pack:
            length = self._of_pack(packed_seq_params, length)
        return self(length, packed_seq=pack, cp_group=group)


def document_rotary(
    transformer: TransformerConfig,
    frequencies: RotaryFrequencies,
    sequence_length: int,
    *,
    channels: int,
    cp_group: ProcessGroup | None,
) -> DocumentRotaryEmbedding:
    """The embedding of a model's heads of `channels` channels."""
    return DocumentRotaryEmbedding(
        frequencies,
        sequence_length,
        fused=transformer.apply_rope_fusion,
        dtype=torch.float32 if has_cosine_factor(transformer) else transformer.params_dtype,
        kv_channels=channels,
        rotary_interleaved=transformer.rotary_interleaved,
        use_cpu_initialization=transformer.use_cpu_initialization,
        cp_group=cp_group,
    )


def packed_positions(cu_seqlens: Tensor, tokens: int, context_size: int = 1, context_rank: int = 0) -> Tensor:
    """Positions within their documents of the tokens of one context-parallel rank, without reading the boundaries.

    Args:
        cu_seqlens: integer [documents + 1], boundaries of the whole pack; each document a multiple of 2 x context_size.
        tokens: t, of this rank.

    Returns:
        int64 [t], in the zigzag layout (`parallel.layout`).

    >>> packed_positions(torch.tensor([0, 4, 12]), 6, context_size=2, context_rank=0).tolist()
    [0, 3, 0, 1, 6, 7]
    """
    bounds = cu_seqlens.long() // context_size
    row_T = torch.arange(tokens, device=cu_seqlens.device)
    document_T = torch.searchsorted(bounds[1:], row_T, right=True)
    place_T = row_T - bounds[document_T]
    if context_size == 1:
        return place_T
    chunk_T = bounds.diff()[document_T] // 2
    chunks_before_T = torch.where(place_T < chunk_T, context_rank, 2 * context_size - context_rank - 2)
    return place_T + chunk_T * chunks_before_T


def table_length(tokens: int) -> int:
    """Positions in the rotary table of a pack: more than its tokens, by an eighth at most (and by 1 at least).

    >>> table_length(100), table_length(128), table_length(3)
    (104, 144, 4)
    """
    step = 1 << max(0, tokens.bit_length() - 4)
    return (tokens // step + 1) * step
