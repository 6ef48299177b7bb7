"""The `model` section: the shape of the decoder, its rotary embedding, and where its first weights come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moba_megatron.config.section import Section


class ModelConfig(Section):
    """A Llama-style decoder (RMSNorm, SwiGLU, rotary embedding). Names are megatron-core's own."""

    init_from: str | None = None
    """Where a new run takes its weights from: a Hugging Face folder (config.json and safetensors), a run folder, or a
    checkpoint folder. What this section leaves out is then as there. A resumed run does not load these weights again,
    but at every start this section is filled up from there, unless it is complete, as in RUN/config.yaml. None: they
    are drawn. `???` in a recipe: to be given before training; plans and dry runs do without."""
    num_layers: int = Field(ge=1)
    """Decoder layers."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    num_attention_heads: int = Field(ge=1)
    """Query heads."""
    num_query_groups: int | None = Field(default=None, ge=1)
    """Key/value heads (grouped-query attention). Default: one for each query head."""
    kv_channels: int | None = Field(default=None, ge=1)
    """Size of one head. Default: hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = Field(default=None, ge=1)
    """Width of the SwiGLU layer. Default: 8/3 hidden_size rounded up to a multiple of 256, as in Llama."""
    vocab_size: int | None = Field(default=None, ge=2)
    """Entries of the embedding before padding. Default: the tokenizer's size, which needs no padding of its own: rows
    are added only up to a multiple of `parallel.tensor`, and they never enter the loss."""
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm. Llama 3 and Mistral use 1e-5, Qwen 1e-6; the wrong one costs 2e-3 in the logits."""
    init_method_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    share_embeddings_and_output_weights: bool = False
    """Tie the output layer to the embedding."""
    add_qkv_bias: bool = False
    """Biases on queries, keys and values (Qwen 2)."""
    qk_layernorm: bool = False
    """RMSNorm on each query and key head (Qwen 3)."""
    rotary_base: float = Field(default=10000.0, gt=0)
    """Base of the rotary embedding (Llama 3: 500000)."""
    rotary_scaling: Literal["none", "linear", "llama3", "longrope"] = "none"
    """How the rotary frequencies differ from powers of the base. `linear` is position interpolation (arXiv
    2306.15595): positions divided by the factor. `llama3` is the scaling of Llama 3.1: long waves divided by the
    factor, short ones kept. `longrope` (arXiv 2402.13753): each frequency divided by a factor of its own."""
    rotary_scaling_factor: float = Field(default=1.0, ge=1.0)
    """Factor of `linear` and `llama3`: the new length over the old one."""
    rotary_low_freq_factor: float = Field(default=1.0, gt=0)
    """`llama3`: waves longer than rotary_original_length over this are divided by the factor."""
    rotary_high_freq_factor: float = Field(default=4.0, gt=0)
    """`llama3`: waves shorter than rotary_original_length over this are kept; in between the two are blended."""
    rotary_original_length: int = Field(default=8192, ge=1)
    """`llama3` and `longrope`: the length (tokens) before the extension."""
    rotary_short_factors: list[float] | None = None
    """`longrope`: divisors of the frequencies, one for each pair of channels of a head, for sequences of up to
    rotary_original_length tokens. Packs of documents take those for `data.sequence_length`."""
    rotary_long_factors: list[float] | None = None
    """`longrope`: the same for longer sequences."""
    rotary_attention_factor: float = Field(default=1.0, gt=0)
    """`longrope`: what queries and keys are multiplied by; scores grow by its square."""
    rotary_interpolation: float = Field(default=1.0, ge=1.0)
    """Position interpolation on top of `llama3` or `longrope`: positions divided by this (the MoBA report's way from
    128K to 1M). For `none` use `linear`."""

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 256 * -(-8 * self.hidden_size // (3 * 256))


def rotary_checks(model: ModelConfig) -> list[tuple[bool, str]]:
    """Settings of the rotary embedding that cannot work together: (wrong, what to say) for each."""
    scaling, factors = model.rotary_scaling, (model.rotary_short_factors, model.rotary_long_factors)
    pairs = model.head_size // 2
    belongs = f"with model.rotary_scaling = {scaling}: it belongs to"
    low, high = model.rotary_low_freq_factor, model.rotary_high_freq_factor
    wrong_lengths = [f"{len(values)}" for values in factors if values is not None and len(values) != pairs]
    return [
        (model.head_size % 2 != 0, f"size of a head = {model.head_size}: rotary embedding needs an even one"),
        (
            scaling in ("none", "longrope") and model.rotary_scaling_factor != 1.0,
            f"model.rotary_scaling_factor = {model.rotary_scaling_factor} has no effect {belongs} linear and llama3",
        ),
        (
            scaling == "llama3" and low >= high,
            f"model.rotary_low_freq_factor = {low} must be below model.rotary_high_freq_factor = {high}",
        ),
        (
            scaling == "longrope" and None in factors,
            "model.rotary_scaling = longrope needs model.rotary_short_factors and model.rotary_long_factors",
        ),
        (
            scaling != "longrope" and factors != (None, None),
            f"model.rotary_short_factors and rotary_long_factors have no effect {belongs} longrope",
        ),
        (
            scaling != "longrope" and model.rotary_attention_factor != 1.0,
            f"model.rotary_attention_factor = {model.rotary_attention_factor} has no effect {belongs} longrope",
        ),
        (
            bool(wrong_lengths),
            f"model.rotary_short_factors and rotary_long_factors have {' and '.join(wrong_lengths)} entries: give "
            f"{pairs}, half the size of a head",
        ),
        (
            any(value <= 0 for values in factors for value in values or []),
            "model.rotary_short_factors and rotary_long_factors must be above 0",
        ),
        (
            scaling in ("none", "linear") and model.rotary_interpolation != 1.0,
            f"model.rotary_interpolation = {model.rotary_interpolation} with model.rotary_scaling = {scaling}: set "
            "model.rotary_scaling = linear and say all of it by model.rotary_scaling_factor",
        ),
    ]
