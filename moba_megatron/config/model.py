"""The `model` section: the shape of the decoder, its rotary embedding, and where its first weights come from."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from moba_megatron.config.section import MOST_LAYERS, Section

Balancing = Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"]
Exports = Literal[
    "llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "mixtral", "qwen3_moe", "qwen2_moe"
]  # fmt: skip
LayerHasExperts = Annotated[int, Field(ge=0, le=1)]


class ModelConfig(Section):
    """A Llama-style decoder (RMSNorm, SwiGLU, rotary embedding). Names are megatron-core's own."""

    init_from: str | None = None
    """First weights of a new run: a Hugging Face folder (config.json and safetensors), a run folder, or a checkpoint
    folder. It also gives the keys that this section leaves out, at every start, unless the section is complete, as in
    RUN/config.yaml. A resumed run does not load these weights again. None: random weights. `???` in a file: a training
    needs a value; plans and dry runs do not."""
    num_layers: int = Field(ge=1, le=MOST_LAYERS)
    """Decoder layers."""
    hidden_size: int = Field(ge=1, le=2**18)
    """Width of the residual stream."""
    num_attention_heads: int = Field(ge=1, le=2**14)
    """Query heads."""
    num_query_groups: int | None = Field(default=None, ge=1, le=2**14)
    """Key/value heads (grouped-query attention). Default: one for each query head."""
    kv_channels: int | None = Field(default=None, ge=1, le=2**14)
    """Size of one head. Default: hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = Field(default=None, ge=1, le=2**22)
    """Width of the SwiGLU layer. Default: 8/3 hidden_size rounded up to a multiple of 256, as in Llama."""
    max_position_embeddings: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """Longest text (tokens) of the source model. Exports keep the larger of it and the training length. Default: from
    `init_from`."""
    export_as: Exports | None = None
    """Hugging Face family of exports, if several families can compute this model. Default: the family of `init_from`,
    else the first that fits."""
    vocab_size: int | None = Field(default=None, ge=2, le=2**24)
    """Entries of the embedding before padding. Default: the tokenizer's size. Padding adds rows up to a multiple of
    `parallel.tensor`; they never count in the loss."""
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm. Llama 3 and Mistral use 1e-5, Qwen 1e-6; the wrong one changes logits by 2e-3."""
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
    rotary_percent: float = Field(default=1.0, gt=0, le=1)
    """Part of each head's channels that is rotated, from the first on (Phi-4-mini: 0.75)."""
    no_rope_freq: list[int] | None = None
    """Layers without rotary embedding: 1 for each that has none, 0 for the others (SmolLM3: every fourth is 1).
    Default: all layers are rotated."""
    rotary_scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    """How the rotary frequencies differ from powers of the base. `linear` is position interpolation (arXiv
    2306.15595): positions divided by the factor. `llama3` is the scaling of Llama 3.1: long waves divided by the
    factor, short ones kept. `yarn` (arXiv 2309.00071) does the same by channel, and scales the scores up; it extends
    Qwen 2.5 and 3 from 32K to 128K. `longrope` (arXiv 2402.13753): each frequency is divided by its own factor."""
    rotary_scaling_factor: float = Field(default=1.0, ge=1.0)
    """Factor of `linear`, `llama3` and `yarn`: the new length over the old one."""
    rotary_low_freq_factor: float = Field(default=1.0, gt=0)
    """`llama3`: waves longer than rotary_original_length over this are divided by the factor."""
    rotary_high_freq_factor: float = Field(default=4.0, gt=0)
    """`llama3`: waves shorter than rotary_original_length over this are kept; in between the two are blended."""
    rotary_original_length: int = Field(default=8192, ge=1, le=2**31 - 1)
    """`llama3`, `yarn` and `longrope`: the length (tokens) before the extension. If this run extends a plain model of
    `init_from` by `yarn`, the default is its `max_position_embeddings`."""
    rotary_beta_fast: float = Field(default=32.0, gt=0)
    """`yarn`: channels that turn more often than this within rotary_original_length are kept."""
    rotary_beta_slow: float = Field(default=1.0, gt=0)
    """`yarn`: channels that turn less often than this are divided by the factor; in between the two are blended."""
    rotary_truncate: bool = True
    """`yarn`: these two bounds are rounded to whole channels."""
    rotary_mscale: float | None = Field(default=None, gt=0)
    """`yarn`: with rotary_mscale_all_dim, rotary_attention_factor is (0.1 mscale ln(factor) + 1) over the same of
    mscale_all_dim (DeepSeek's way; two equal numbers make it 1)."""
    rotary_mscale_all_dim: float | None = Field(default=None, gt=0)
    """`yarn`: see rotary_mscale."""
    rotary_short_factors: list[float] | None = None
    """`longrope`: divisors of the frequencies, one for each pair of rotated channels, for sequences of up to
    rotary_original_length tokens. Packs of documents use the list for `data.sequence_length`."""
    rotary_long_factors: list[float] | None = None
    """`longrope`: the same for longer sequences."""
    rotary_attention_factor: float | None = Field(default=None, gt=0)
    """`yarn` and `longrope`: factor on the rotated channels of queries and keys; scores grow by its square. Default: 1
    for `longrope`; 0.1 ln(factor) + 1 for `yarn`, or the value from rotary_mscale."""
    rotary_interpolation: float = Field(default=1.0, ge=1.0)
    """Position interpolation on top of `llama3`, `yarn` or `longrope`: positions divided by this (the MoBA report's way
    from 128K to 1M). For `none` use `linear`."""
    num_moe_experts: int | None = Field(default=None, ge=2, le=2**16)
    """Experts in a layer (mixture of experts), each a SwiGLU layer. All other `moe_` keys need it. Default: none, the
    layers are dense."""
    moe_router_topk: int = Field(default=2, ge=1, le=2**16)
    """Experts that process each token."""
    moe_ffn_hidden_size: int | None = Field(default=None, ge=1, le=2**22)
    """Width of one expert. Default: `ffn_hidden_size`, which dense layers keep."""
    moe_layer_freq: Annotated[int, Field(ge=1, le=MOST_LAYERS)] | list[LayerHasExperts] = 1
    """Which layers have experts: every n-th, from the first on; or a list of 1 (experts) and 0 (dense), one for each
    layer."""
    moe_shared_expert_intermediate_size: int | None = Field(default=None, ge=1, le=2**22)
    """Width of the shared expert, which processes every token; of several, the sum of their widths. Default: none."""
    moe_shared_expert_gate: bool = False
    """Multiply the output of the shared expert by a sigmoid gate of the token (Qwen 2 MoE)."""
    moe_router_load_balancing_type: Balancing = "aux_loss"
    """How the load of experts is balanced. `aux_loss`: the loss of the Switch Transformer (arXiv 2101.03961) over the
    tokens of a microbatch. `seq_aux_loss`: the same over each sequence; a pack of documents counts as one sequence.
    `global_aux_loss`: the same over the microbatches of all data-parallel ranks, and the earlier ones of the step
    (arXiv 2501.11873). These need `moe_aux_loss_coeff`. `sinkhorn`: a balanced assignment, only in training. `none`: no
    balancing, or only `moe_router_enable_expert_bias`."""
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the balancing loss, added to the loss of the language model; 1e-2 is usual. Padding does not count. 0:
    no balancing loss."""
    moe_z_loss_coeff: float | None = Field(default=None, gt=0)
    """Weight of the z-loss (arXiv 2202.08906), the mean over tokens of the squared log-sum-exp of the router's scores,
    which keeps scores small; 1e-3 is usual. Default: none."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """Function from the router's logits to the weights of experts. `sigmoid` divides by the sum over the chosen experts
    (DeepSeek-V3)."""
    moe_router_pre_softmax: bool = False
    """True: the softmax is over all experts, so the weights of the chosen ones add up to less than 1. False: it is over
    the chosen experts. It is the opposite of Hugging Face's `norm_topk_prob`."""
    moe_router_enable_expert_bias: bool = False
    """Add a bias to each expert's score when choosing experts, but not to its weight. After each step the bias rises
    for experts with fewer tokens than the mean and falls for those with more (arXiv 2408.15664). Checkpoints save it.
    It needs `moe_router_score_function: sigmoid`."""
    moe_router_bias_update_rate: float = Field(default=1e-3, gt=0)
    """Change of this bias in a step."""
    moe_router_topk_scaling_factor: float | None = Field(default=None, gt=0)
    """Factor on the weights of the chosen experts (DeepSeek-V3: 2.5). Default: 1."""
    moe_router_num_groups: int | None = Field(default=None, ge=2, le=2**16)
    """Number of equal groups of neighbouring experts. A token first chooses `moe_router_group_topk` of them
    (DeepSeek-V3). Default: one group."""
    moe_router_group_topk: int | None = Field(default=None, ge=1, le=2**16)
    """Groups from which a token chooses experts. Default: all."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    """Precision of the router's product and scores. Default: `training.precision`; use `fp32` with many experts in
    bf16."""
    moe_expert_capacity_factor: float | None = Field(default=None, gt=0)
    """Largest number of tokens that one expert takes from a rank in a microbatch, over the mean of all experts. Further
    tokens skip the expert. Which tokens are dropped depends on the layout. Default: no token is dropped."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens an expert keeps: those that give it the most weight (`probs`), or the first ones (`position`)."""
    moe_pad_expert_input_to_capacity: bool = False
    """Fill every expert's tokens up to its capacity, so that all sizes are fixed."""

    @property
    def expert_layers(self) -> list[bool]:
        """Which layers are mixtures of experts."""
        if self.num_moe_experts is None:
            return [False] * self.num_layers
        if isinstance(self.moe_layer_freq, int):
            return [number % self.moe_layer_freq == 0 for number in range(self.num_layers)]
        return [bool(entry) for entry in self.moe_layer_freq]

    @property
    def expert_ffn_size(self) -> int:
        return self.moe_ffn_hidden_size or self.ffn_size

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 256 * -(-8 * self.hidden_size // (3 * 256))

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_size * self.rotary_percent)

    @property
    def rotates_everything(self) -> bool:
        """Whether all channels of all layers are rotated."""
        return self.rotary_channels == self.head_size and not any(self.no_rope_freq or ())

    @property
    def window(self) -> int | None:
        """Tokens that the model this run starts from was made for, with those that its yarn adds; None: not known."""
        if self.max_position_embeddings is None or self.rotary_scaling != "yarn":
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(self.rotary_scaling_factor * self.rotary_original_length))

    @property
    def attention_factor(self) -> float:
        """`rotary_attention_factor`, or its default."""
        if self.rotary_attention_factor is not None or self.rotary_scaling != "yarn":
            return self.rotary_attention_factor or 1.0
        return yarn_attention_factor(self.rotary_scaling_factor, self.rotary_mscale, self.rotary_mscale_all_dim)


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Factor of YaRN on queries and keys (arXiv 2309.00071, equation 22), and DeepSeek's form of it.

    >>> round(yarn_attention_factor(4.0, None, None), 4), yarn_attention_factor(40.0, 0.707, 0.707)
    (1.1386, 1.0)
    """

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1.0)


def longrope_attention_factor(factor: float, original: int) -> float:
    """Factor of LongRoPE on queries and keys (arXiv 2402.13753), as in transformers.

    Args:
        factor: the new length over the old one.
        original: the old one, in tokens.
    """
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
