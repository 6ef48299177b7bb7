"""The families of Hugging Face models, one row each: defaults of `config.json`, the keys of our `model` section, the
models that the family can compute, the names of its weights, and the keys of an export.

All are decoders of RMSNorm, SwiGLU and rotary embedding. They differ in biases, norms of queries and keys, rotated
layers and channels, separate or joint projections, and experts (`expert_families`).
"""

from __future__ import annotations

from moba_megatron.config import expert_families as experts
from moba_megatron.config.family import Family, Values
from moba_megatron.config.model import ModelConfig


def _window_if_used(values: Values) -> int | None:
    return values.get("sliding_window") if values.get("use_sliding_window") else None


def _window_if_ever_left(values: Values) -> int | None:
    """Phi-4-mini names a window of twice its positions."""
    window = values.get("sliding_window")
    return None if window is None or window >= values["max_position_embeddings"] else window


def _smollm3_problems(values: Values) -> list[str]:
    layers, interval, given = (
        values["num_hidden_layers"],
        values["no_rope_layer_interval"],
        values.get("no_rope_layers"),
    )
    if given is not None and len(given) < layers:
        return [f"no_rope_layers has {len(given)} entries for {layers} layers: give one for each"]
    if given is None and interval < 1:
        return [f"no_rope_layer_interval = {interval} must be at least 1; or say the layers by no_rope_layers"]
    return []


def _smollm3_section(values: Values) -> Values:
    layers, interval = values["num_hidden_layers"], values["no_rope_layer_interval"]
    rotated = values.get("no_rope_layers")
    if rotated is None:
        rotated = [int((n + 1) % interval != 0) for n in range(layers)]
    skipped = [int(not flag) for flag in rotated[:layers]]
    return {"no_rope_freq": skipped if any(skipped) else None}


def _smollm3_written(model: ModelConfig) -> Values:
    skipped = model.no_rope_freq or [0] * model.num_layers
    return {
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": [1 - flag for flag in skipped],
    }


_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
_EXPERTS = {"router_aux_loss_coef": 0.001}
_QWEN_EXPERTS = {
    "max_position_embeddings": 32768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {**_COMMON, "max_position_embeddings": 2048},
        written=lambda model: {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
        fits_width=lambda model: model.hidden_size % model.num_attention_heads == 0,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {**_COMMON, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        written=lambda model: {"sliding_window": None},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 32},
        always={"add_qkv_bias": True},
        written=lambda model: {"use_sliding_window": False, "sliding_window": None},
        window=_window_if_used,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        always={"qk_layernorm": True},
        written=lambda model: {"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
        window=_window_if_used,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {
            **_COMMON,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        may=("rotary_percent",),
        written=lambda model: {"sliding_window": None},
        window=_window_if_ever_left,
        fused=True,
        scalings=("none", "longrope"),
        short_longrope=True,
        # Their meaning in transformers in this family.
        rope_names={"su": "longrope", "yarn": "longrope"},
        fits_width=lambda model: model.head_size * model.num_attention_heads == model.hidden_size,
        own_code=("configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM"),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            **_COMMON,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
        rope_theta=2000000.0,
        may=("no_rope_freq",),
        section=_smollm3_section,
        problems=_smollm3_problems,
        written=_smollm3_written,
        window=_window_if_used,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            **_COMMON,
            **_EXPERTS,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 2,
            "num_experts": 8,
        },
        rope_theta=1000000.0,
        may=experts.ANY,
        section=experts.mixtral_section,
        problems=experts.mixtral_problems,
        written=experts.mixtral_written,
        lacks=experts.uniform,
        mixture="block_sparse_moe",
        expert_parts=("w1", "w3", "w2"),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            **_COMMON,
            **_EXPERTS,
            **_QWEN_EXPERTS,
            "num_key_value_heads": 4,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "moe_intermediate_size": 768,
        },
        always={"qk_layernorm": True},
        may=experts.ANY,
        section=experts.qwen_section,
        problems=experts.qwen_problems,
        written=experts.qwen3_written,
        window=_window_if_used,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        {
            **_COMMON,
            **_EXPERTS,
            **_QWEN_EXPERTS,
            "num_key_value_heads": 16,
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "max_window_layers": 28,
            "qkv_bias": True,
        },
        may=(*experts.ANY, *experts.SHARED, "add_qkv_bias"),
        section=experts.qwen2_section,
        problems=experts.qwen_problems,
        written=experts.qwen2_written,
        window=experts.window_of_layers,
        lacks=experts.without_shared,
    ),
}


def families_of(model: ModelConfig) -> list[str]:
    """Every `model_type` that computes this model, the one to take without a wish first."""
    if experts.unwritten(model):
        return []
    return [name for name, family in FAMILIES.items() if family.refuses(model) is None]


def family_checks(model: ModelConfig) -> list[tuple[bool, str]]:
    """Whether `model.export_as` computes the model: (wrong, what to say)."""
    wish = model.export_as
    refused = FAMILIES[wish].refuses(model) if wish else None
    others = families_of(model)
    instead = f"use {' or '.join(others)}, or set it to null" if others else "set it to null"
    return [
        (
            refused is not None,
            f"model.export_as = {wish}: {wish and FAMILIES[wish].architecture} does not compute {refused}: {instead}",
        )
    ]
