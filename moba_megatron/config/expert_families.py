"""Mixtures of experts in transformers: the keys of a `config.json` as our `model` section and back, and the settings
that no family of transformers has.

The families differ in little: all experts of a layer are SwiGLU layers of one width, and a router of softmax scores
chooses `num_experts_per_tok` of them. With `norm_topk_prob: true` the weights of the chosen experts add up to 1: a
softmax over these experts (`moe_router_pre_softmax: false`). Mixtral always does so. Qwen may have dense layers in
between, and Qwen 2 has a shared expert with a gate for all tokens.
"""

from __future__ import annotations

from moba_megatron.config.family import MARKS, MOBA_IN_TRANSFORMERS, Values
from moba_megatron.config.model import ModelConfig

ANY = ("num_moe_experts", "moe_router_pre_softmax")
"""Settings of ours that a mixture of transformers may have or not."""
SHARED = ("moe_shared_expert_intermediate_size", "moe_shared_expert_gate")
_OTHER_TRAINING = "train with {} to be able to export it"
_GO_ON = "go on without it (model.init_from = this run, {}) to be able to export it"
UNWRITTEN: dict[str, str] = {
    "moe_router_score_function": _OTHER_TRAINING.format("softmax"),
    "moe_router_enable_expert_bias": _OTHER_TRAINING.format("softmax scores and aux_loss"),
    "moe_router_topk_scaling_factor": _OTHER_TRAINING.format("no factor"),
    "moe_router_num_groups": _OTHER_TRAINING.format("one group"),
    "moe_expert_capacity_factor": _GO_ON.format("model.moe_expert_capacity_factor = null"),
}
"""Settings that no mixture of transformers has, and what to do."""
SINKHORN = "moe_router_load_balancing_type"


def unwritten(model: ModelConfig) -> list[str]:
    """What of a mixture of experts no family of transformers computes, one line each, with what to do."""
    if model.num_moe_experts is None:
        return []
    lines = [
        f"model.{key} = {getattr(model, key)}: no mixture of experts in transformers has it; {fix}"
        for key, fix in UNWRITTEN.items()
        if getattr(model, key) != MARKS[key]
    ]
    if getattr(model, SINKHORN) == "sinkhorn":
        fix = _OTHER_TRAINING.format("aux_loss")
        lines.append(f"model.{SINKHORN} = sinkhorn: no mixture of experts in transformers uses it; {fix}")
    if model.moe_shared_expert_intermediate_size is not None and not model.moe_shared_expert_gate:
        lines.append(
            "model.moe_shared_expert_gate = False: in transformers a shared expert has a gate (Qwen 2 MoE); "
            + _OTHER_TRAINING.format("true")
        )
    return lines


def uniform(model: ModelConfig) -> str | None:
    """Settings that Mixtral cannot compute: dense layers, and weights that do not add up to 1."""
    if not all(model.expert_layers):
        return f"model.moe_layer_freq = {model.moe_layer_freq}"
    return f"model.moe_router_pre_softmax = {model.moe_router_pre_softmax}" if model.moe_router_pre_softmax else None


def without_shared(model: ModelConfig) -> str | None:
    """Settings that Qwen 2 MoE cannot compute: layers without a shared expert."""
    size = model.moe_shared_expert_intermediate_size
    return f"model.moe_shared_expert_intermediate_size = {size}" if size is None else None


def mixtral_section(values: Values) -> Values:
    return {**_section(values), "moe_ffn_hidden_size": values["intermediate_size"], "moe_router_pre_softmax": False}


def qwen_section(values: Values) -> Values:
    """Of Qwen 2 MoE and Qwen 3 MoE."""
    pattern = [int(flag) for flag in _with_experts(values)]
    return {
        **_section(values),
        "moe_ffn_hidden_size": values["moe_intermediate_size"],
        "moe_layer_freq": 1 if all(pattern) else pattern,
        "moe_router_pre_softmax": not values["norm_topk_prob"],
    }


def qwen2_section(values: Values) -> Values:
    return {
        **qwen_section(values),
        "add_qkv_bias": values["qkv_bias"],
        "moe_shared_expert_intermediate_size": values["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": True,
    }


def _section(values: Values) -> Values:
    return {
        "num_moe_experts": values["num_experts"],
        "moe_router_topk": values["num_experts_per_tok"],
        "moe_aux_loss_coeff": values["router_aux_loss_coef"],
    }


def _with_experts(values: Values) -> list[bool]:
    """Which layers of a Qwen have experts: every `decoder_sparse_step`-th, but those of `mlp_only_layers`."""
    step, dense = values["decoder_sparse_step"], values["mlp_only_layers"]
    return [number not in dense and (number + 1) % step == 0 for number in range(values["num_hidden_layers"])]


def mixtral_problems(values: Values) -> list[str]:
    found = _problems(
        values, normalised=True, said="mixtral always makes the weights of the chosen experts add up to 1"
    )
    if (noise := values.get("router_jitter_noise", 0)) > 0:
        found.append(
            f"router_jitter_noise = {noise}: noise on the input of experts in training is not supported; set it to 0 "
            "in config.json, which changes nothing outside training"
        )
    return found


def qwen_problems(values: Values) -> list[str]:
    found = _problems(values, normalised=values["norm_topk_prob"], said="norm_topk_prob = true")
    if not any(_with_experts(values)):
        found.append(
            f"decoder_sparse_step = {values['decoder_sparse_step']} and mlp_only_layers = {values['mlp_only_layers']} "
            f"leave no layer of {values['num_hidden_layers']} with experts: save it as the dense model that it is"
        )
    return found


def _problems(values: Values, *, normalised: bool, said: str) -> list[str]:
    experts, chosen = values["num_experts"], values["num_experts_per_tok"]
    found = []
    if experts < 2:
        found.append(f"num_experts = {experts}: a mixture has at least 2; save it as the dense model that it is")
    elif chosen > experts:
        found.append(f"num_experts_per_tok = {chosen} is over num_experts = {experts}: correct it")
    if chosen == 1 and normalised:
        found.append(
            f"num_experts_per_tok = 1, and {said}: the chosen expert always has weight 1, so the router learns "
            f"nothing; {MOBA_IN_TRANSFORMERS}"
        )
    return found


def window_of_layers(values: Values) -> int | None:
    """The window of a Qwen 2 MoE, if one of its layers has it: its `config.json` says one (of 0) in any case."""
    kinds, most = values.get("layer_types"), values["max_window_layers"]
    if kinds is None:
        # As transformers fills them in.
        windowed = any(number % 2 == 0 and number < most for number in range(values["num_hidden_layers"]))
        used = bool(values.get("use_sliding_window")) and windowed
    else:
        used = "sliding_attention" in kinds
    return values.get("sliding_window") if used else None


def mixtral_written(model: ModelConfig) -> Values:
    return {
        "intermediate_size": model.expert_ffn_size,
        "num_local_experts": model.num_moe_experts,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        **_written(model),
    }


def qwen_written(model: ModelConfig) -> Values:
    return {
        # Each release of transformers knows one of these two for some of the families.
        "num_experts": model.num_moe_experts,
        "num_local_experts": model.num_moe_experts,
        "moe_intermediate_size": model.expert_ffn_size,
        "norm_topk_prob": not model.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [number for number, experts in enumerate(model.expert_layers) if not experts],
        "use_sliding_window": False,
        "sliding_window": None,
        **_written(model),
    }


def qwen3_written(model: ModelConfig) -> Values:
    return {**qwen_written(model), "attention_bias": False}


def qwen2_written(model: ModelConfig) -> Values:
    return {
        **qwen_written(model),
        "qkv_bias": model.add_qkv_bias,
        "shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "max_window_layers": 0,
        "layer_types": ["full_attention"] * model.num_layers,
    }


def _written(model: ModelConfig) -> Values:
    return {
        "num_experts_per_tok": model.moe_router_topk,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
        "output_router_logits": False,
    }
