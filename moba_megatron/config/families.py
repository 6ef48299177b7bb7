"""The families of Hugging Face models, one row each: what `config.json` leaves unsaid, what of it becomes our `model`
section, which of our models the family computes, how its weights are named, and what an export says of it.

All are decoders of RMSNorm, SwiGLU and rotary embedding. They differ in biases, norms of queries and keys, in which
layers and channels are rotated, and in whether projections are stored apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moba_megatron.config.model import ModelConfig

Values = dict[str, Any]
"""Contents of a `config.json`."""

MOBA_IN_TRANSFORMERS = (
    "moba_megatron.hf.configure gives MoBA to every model of transformers that takes its attention from "
    "AttentionInterface, without Megatron (docs/transformers.md)"
)
"""The way to go on with a model that our layers do not compute."""
# What tells families apart, and its value in a model that has nothing of it.
MARKS: dict[str, Any] = {
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "rotary_percent": 1.0,
    "no_rope_freq": None,
    "num_moe_experts": None,
}
SCALINGS = ("none", "linear", "llama3", "yarn", "longrope")


def _window(values: Values) -> int | None:
    return values.get("sliding_window")


def _window_if_used(values: Values) -> int | None:
    return values.get("sliding_window") if values.get("use_sliding_window") else None


def _window_if_ever_left(values: Values) -> int | None:
    """Phi-4-mini says a window of twice its positions."""
    window = values.get("sliding_window")
    return None if window is None or window >= values["max_position_embeddings"] else window


@dataclass(frozen=True)
class Family:
    """One kind of model, by its `model_type`.

    Attributes:
        architecture: its class in transformers.
        defaults: what is there without being said in `config.json`.
        rope_theta: base of the rotary embedding that is there without being said.
        always: what this kind means in our `model` section.
        may: settings of ours that a model of this kind may have or not, of those that tell families apart.
        section: these settings from a `config.json`.
        problems: what of a `config.json` contradicts itself in this kind, one line each.
        written: what an export says beside what all families say.
        window: the window of attention that a `config.json` asks for.
        fused: queries, keys and values are one tensor, gate and up projection another.
        scalings: kinds of rotary scaling that it knows by name; others are written as `longrope`.
        short_longrope: `longrope` is said by its short and long factors alone, where the rest follows from lengths.
        rope_names: other names of kinds of rotary scaling.
        fits_width: whether its class takes these heads in a stream of this width.
        own_code: what `auto_map` may name, because transformers has the same under this name.
    """

    architecture: str
    defaults: Values
    rope_theta: float = 10000.0
    always: dict[str, Any] = field(default_factory=dict)
    may: tuple[str, ...] = ()
    section: Callable[[Values], dict[str, Any]] = lambda values: {}
    problems: Callable[[Values], list[str]] = lambda values: []
    written: Callable[[ModelConfig], Values] = lambda model: {}
    window: Callable[[Values], int | None] = _window
    fused: bool = False
    scalings: tuple[str, ...] = SCALINGS
    short_longrope: bool = False
    rope_names: dict[str, str] = field(default_factory=dict)
    fits_width: Callable[[ModelConfig], bool] = lambda model: True
    own_code: tuple[str, ...] = ()

    def refuses(self, model: ModelConfig) -> str | None:
        """What of a model this kind does not compute, in words; None if it computes it."""
        for key, nothing in MARKS.items():
            value = getattr(model, key)
            if key not in self.may and value != self.always.get(key, nothing):
                return f"model.{key} = {value}"
        if not self.fits_width(model):
            return f"{model.num_attention_heads} heads of {model.head_size} in a width of {model.hidden_size}"
        return None


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


def _smollm3_section(values: Values) -> dict[str, Any]:
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
        # What transformers makes of them in this family.
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
}


def families_of(model: ModelConfig) -> list[str]:
    """Every `model_type` that computes this model, the one to take without a wish first."""
    return [name for name, family in FAMILIES.items() if family.refuses(model) is None]


def family_checks(model: ModelConfig) -> list[tuple[bool, str]]:
    """Whether `model.export_as` computes the model: (wrong, what to say)."""
    wish = model.export_as
    refused = FAMILIES[wish].refuses(model) if wish else None
    others = families_of(model)
    instead = f"use {' or '.join(others)}, or leave it out" if others else "leave it out"
    return [
        (
            refused is not None,
            f"model.export_as = {wish}: {wish and FAMILIES[wish].architecture} does not compute {refused}: {instead}",
        )
    ]
