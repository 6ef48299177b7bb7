"""The description of one family of Hugging Face models, and the differences between families."""

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
"""The way forward with a model that our layers cannot compute."""
# The differences between families, and the values of a model without any of them.
MARKS: dict[str, Any] = {
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "rotary_percent": 1.0,
    "no_rope_freq": None,
    "num_moe_experts": None,
    "moe_router_pre_softmax": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_expert_capacity_factor": None,
}
SCALINGS = ("none", "linear", "llama3", "yarn", "longrope")


def _window(values: Values) -> int | None:
    return values.get("sliding_window")


@dataclass(frozen=True)
class Family:
    """One kind of model, by its `model_type`.

    Attributes:
        architecture: its class in transformers.
        defaults: what is there without being said in `config.json`.
        rope_theta: default base of the rotary embedding.
        always: what this kind means in our `model` section.
        may: settings of ours that a model of this kind may have or not, of those that tell families apart.
        section: these settings from a `config.json`.
        problems: what of a `config.json` contradicts itself in this kind, one line each.
        written: what an export says beside what all families say.
        window: the window of attention that a `config.json` asks for.
        fused: queries, keys and values are one tensor, gate and up projection another.
        scalings: kinds of rotary scaling that it knows by name; others are written as `longrope`.
        short_longrope: `longrope` is given only by its short and long factors; the rest follows from lengths.
        rope_names: other names of kinds of rotary scaling.
        fits_width: whether its class takes these heads in a stream of this width.
        own_code: what `auto_map` may name, because transformers has the same under this name.
        lacks: what else of a model it does not compute, in words.
        mixture: the module of a layer that holds its router and experts in files.
        expert_parts: gate, up and down projection of an expert, in files.
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
    lacks: Callable[[ModelConfig], str | None] = lambda model: None
    mixture: str = "mlp"
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    @property
    def has_experts(self) -> bool:
        return "num_moe_experts" in self.may

    def refuses(self, model: ModelConfig) -> str | None:
        """What of a model this kind does not compute, in words; None if it computes it."""
        for key, nothing in MARKS.items():
            value = getattr(model, key)
            if key not in self.may and value != self.always.get(key, nothing):
                return f"model.{key} = {value}"
        if not self.fits_width(model):
            return f"{model.num_attention_heads} heads of {model.head_size} in a width of {model.hidden_size}"
        if self.has_experts and model.num_moe_experts is None:
            return f"model.num_moe_experts = {model.num_moe_experts}"
        return self.lacks(model)
