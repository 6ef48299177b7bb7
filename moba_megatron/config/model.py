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
    """Where a new run takes its weights from: a Hugging Face folder (config.json and safetensors), a run folder, or a
    checkpoint folder. What this section leaves out is then as there. A resumed run does not load these weights again,
    but at every start this section is filled up from there, unless it is complete, as in RUN/config.yaml. None: they
    are drawn. `???` in a recipe: to be given before training; plans and dry runs do without."""
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
    """Tokens that the model this run starts from was made for; exports keep the larger of it and what was trained.
    Default: of `init_from`."""
    export_as: Exports | None = None
    """The kind of Hugging Face model that exports are, where several compute this one. Default: that of `init_from`,
    else the first that does."""
    vocab_size: int | None = Field(default=None, ge=2, le=2**24)
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
    rotary_percent: float = Field(default=1.0, gt=0, le=1)
    """Part of each head's channels that is rotated, from the first on (Phi-4-mini: 0.75)."""
    no_rope_freq: list[int] | None = None
    """Layers without rotary embedding: 1 for each that has none, 0 for the others (SmolLM3: every fourth is 1).
    Default: all layers are rotated."""
    rotary_scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    """How the rotary frequencies differ from powers of the base. `linear` is position interpolation (arXiv
    2306.15595): positions divided by the factor. `llama3` is the scaling of Llama 3.1: long waves divided by the
    factor, short ones kept. `yarn` (arXiv 2309.00071) does the same by channel, and sharpens the scores; Qwen 2.5 and 3
    go from 32K to 128K by it. `longrope` (arXiv 2402.13753): each frequency divided by a factor of its own."""
    rotary_scaling_factor: float = Field(default=1.0, ge=1.0)
    """Factor of `linear`, `llama3` and `yarn`: the new length over the old one."""
    rotary_low_freq_factor: float = Field(default=1.0, gt=0)
    """`llama3`: waves longer than rotary_original_length over this are divided by the factor."""
    rotary_high_freq_factor: float = Field(default=4.0, gt=0)
    """`llama3`: waves shorter than rotary_original_length over this are kept; in between the two are blended."""
    rotary_original_length: int = Field(default=8192, ge=1, le=2**31 - 1)
    """`llama3`, `yarn` and `longrope`: the length (tokens) before the extension. A plain model of `init_from` that this
    run extends by `yarn` gives its `max_position_embeddings`."""
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
    rotary_original_length tokens. Packs of documents take those for `data.sequence_length`."""
    rotary_long_factors: list[float] | None = None
    """`longrope`: the same for longer sequences."""
    rotary_attention_factor: float | None = Field(default=None, gt=0)
    """`yarn` and `longrope`: what the rotated channels of queries and keys are multiplied by; their scores grow by its
    square. Default: 1 for `longrope`, for `yarn` 0.1 ln(factor) + 1 or what rotary_mscale says."""
    rotary_interpolation: float = Field(default=1.0, ge=1.0)
    """Position interpolation on top of `llama3`, `yarn` or `longrope`: positions divided by this (the MoBA report's way
    from 128K to 1M). For `none` use `linear`."""
    num_moe_experts: int | None = Field(default=None, ge=2, le=2**16)
    """Experts of a layer, each a SwiGLU layer of its own (mixture of experts). All other `moe_` keys need it. Default:
    none, the layers are dense."""
    moe_router_topk: int = Field(default=2, ge=1, le=2**16)
    """Experts that a token is sent to."""
    moe_ffn_hidden_size: int | None = Field(default=None, ge=1, le=2**22)
    """Width of one expert. Default: `ffn_hidden_size`, which dense layers keep."""
    moe_layer_freq: Annotated[int, Field(ge=1, le=MOST_LAYERS)] | list[LayerHasExperts] = 1
    """Which layers have experts: every n-th, from the first on; or a list of 1 (experts) and 0 (dense), one for each
    layer."""
    moe_shared_expert_intermediate_size: int | None = Field(default=None, ge=1, le=2**22)
    """Width of the expert that every token passes besides, of several together: their sum. Default: none."""
    moe_shared_expert_gate: bool = False
    """Multiply what the shared expert gives by a sigmoid of the token (Qwen 2 MoE)."""
    moe_router_load_balancing_type: Balancing = "aux_loss"
    """What keeps the load of experts even. `aux_loss`: the loss of the Switch Transformer (arXiv 2101.03961) over the
    tokens of a microbatch. `seq_aux_loss`: the same over each sequence; a pack of documents counts as one sequence.
    `global_aux_loss`: over the microbatches of all data-parallel ranks, and those before it in the step (arXiv
    2501.11873). These need `moe_aux_loss_coeff`. `sinkhorn`: the assignment itself is balanced, in training only.
    `none`: nothing, or `moe_router_enable_expert_bias`."""
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the balancing loss beside the loss of the language model; 1e-2 is usual. Padding has no part in it. 0:
    it is not computed."""
    moe_z_loss_coeff: float | None = Field(default=None, gt=0)
    """Weight of the z-loss (arXiv 2202.08906), the mean over tokens of the squared log-sum-exp of the router's scores,
    which keeps them small; 1e-3 is usual. Default: none."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """From the router's logits to the scores that weigh experts. `sigmoid` divides them by the sum of the chosen ones
    (DeepSeek-V3)."""
    moe_router_pre_softmax: bool = False
    """Take the softmax over all experts before choosing, so that the weights of a token add up to less than 1. False:
    over the chosen ones. Hugging Face's `norm_topk_prob` is the reverse of it."""
    moe_router_enable_expert_bias: bool = False
    """A bias of each expert that decides which are chosen, not what they weigh: raised after each step for experts with
    fewer tokens than the mean, lowered for those with more (arXiv 2408.15664). Saved in checkpoints. It needs
    `moe_router_score_function: sigmoid`."""
    moe_router_bias_update_rate: float = Field(default=1e-3, gt=0)
    """How far this bias moves in a step."""
    moe_router_topk_scaling_factor: float | None = Field(default=None, gt=0)
    """What the weights of the chosen experts are multiplied by (DeepSeek-V3: 2.5). Default: 1."""
    moe_router_num_groups: int | None = Field(default=None, ge=2, le=2**16)
    """Equal groups of neighbouring experts, of which a token chooses `moe_router_group_topk` first (DeepSeek-V3).
    Default: one group."""
    moe_router_group_topk: int | None = Field(default=None, ge=1, le=2**16)
    """Groups that a token may choose experts of. Default: all."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    """Precision of the router's product and scores. Default: that of the training; with many experts in bf16 take
    `fp32`."""
    moe_expert_capacity_factor: float | None = Field(default=None, gt=0)
    """Most tokens of a microbatch that one expert takes from a rank, over the mean of all experts; those beyond it pass
    the layer by. What is dropped depends on the layout. Default: no token is dropped."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens are kept: those that weigh the expert most (`probs`), or the first ones (`position`)."""
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
        """`rotary_attention_factor`, or what it is by default."""
        if self.rotary_attention_factor is not None or self.rotary_scaling != "yarn":
            return self.rotary_attention_factor or 1.0
        return yarn_attention_factor(self.rotary_scaling_factor, self.rotary_mscale, self.rotary_mscale_all_dim)


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """What YaRN multiplies queries and keys by (arXiv 2309.00071, equation 22), and DeepSeek's form of it.

    >>> round(yarn_attention_factor(4.0, None, None), 4), yarn_attention_factor(40.0, 0.707, 0.707)
    (1.1386, 1.0)
    """

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1.0)


def longrope_attention_factor(factor: float, original: int) -> float:
    """What LongRoPE multiplies queries and keys by (arXiv 2402.13753), as transformers has it.

    Args:
        factor: the new length over the old one.
        original: the old one, in tokens.
    """
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
