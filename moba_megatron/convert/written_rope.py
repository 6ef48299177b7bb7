"""The rotary embedding of an exported `config.json`.

It is written in the formats of transformers 4 and 5, with the original length in both places. Without its own keys
transformers 4 would silently use base 10000.

Published Phi-3 models give `longrope` only by its two lists, and transformers 4 accepts nothing else in this family:
the factor on queries and keys then follows from the lengths. The export omits the factor if it follows correctly.
Otherwise it writes the factor, and transformers 4 refuses to load the model.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from moba_megatron.config import ModelConfig
from moba_megatron.config.families import Family
from moba_megatron.config.model import longrope_attention_factor, yarn_attention_factor
from moba_megatron.model.rotary import rotary_frequencies

# Within the rotary embedding, for other engines than transformers.
_FOR_OTHERS = {"short_mscale", "long_mscale", "attn_factor"}


def written_positions(model: ModelConfig, length: int, family: Family) -> int:
    """`max_position_embeddings` of an export of a model that was trained on `length` tokens.

    transformers 4 computes yarn's factor anew, as `max_position_embeddings` over the original length.
    """
    reach = model.rotary_scaling_factor * model.rotary_original_length
    named = model.rotary_scaling == "yarn" and model.rotary_interpolation == 1.0 and "yarn" in family.scalings
    return max(length, int(reach)) if named and reach == int(reach) else length


def written_rope(model: ModelConfig, length: int, family: Family) -> dict[str, Any]:
    """The rotary embedding with the keys of transformers 4 and 5.

    Args:
        length: what is written as `max_position_embeddings`.
        family: the kind of the export.
    """
    scaling = _scaling(model, length, family)
    part = {"partial_rotary_factor": model.rotary_percent} if "rotary_percent" in family.may else {}
    both = {
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": model.rotary_base, **(scaling or {"rope_type": "default"}), **part},
        **part,
    }
    if scaling is None:
        return both
    if family.short_longrope and scaling["attention_factor"] == longrope_attention_factor(
        length / model.rotary_original_length, model.rotary_original_length
    ):
        short = {key: scaling[key] for key in ("short_factor", "long_factor")}
        both["rope_scaling"] = {"type": "longrope", **short}
        both["rope_parameters"] = {"rope_theta": model.rotary_base, "rope_type": "longrope", **short, **part}
        both["original_max_position_embeddings"] = model.rotary_original_length
        return both
    # transformers warns of keys that it does not read, unless it is told.
    if unread := sorted(_FOR_OTHERS & scaling.keys()):
        both["ignore_keys_at_rope_validation"] = unread
    if scaling["rope_type"] in ("yarn", "longrope"):
        both["original_max_position_embeddings"] = model.rotary_original_length
    return both


def _scaling(model: ModelConfig, length: int, family: Family) -> dict[str, Any] | None:
    original = {"original_max_position_embeddings": model.rotary_original_length}
    longrope = {
        "rope_type": "longrope",
        "attention_factor": model.attention_factor,
        # What engines read that know no attention_factor (vLLM, SGLang).
        "short_mscale": model.attention_factor,
        "long_mscale": model.attention_factor,
        # Without effect beside attention_factor, but transformers warns where it is missing.
        "factor": max(1.0, length / model.rotary_original_length),
        **original,
    }
    # transformers 4 would take another factor than yarn's.
    misread = model.rotary_scaling == "yarn" and length != model.rotary_scaling_factor * model.rotary_original_length
    if misread or model.rotary_interpolation != 1.0 or model.rotary_scaling not in family.scalings:
        # Interpolated positions on top of another scaling have no name of their own; longrope can say any frequencies.
        frequencies = rotary_frequencies(model)
        short, long = _longrope_factors(model, frequencies.short), _longrope_factors(model, frequencies.long)
        return {**longrope, "short_factor": short, "long_factor": long}
    if model.rotary_scaling == "linear":
        return {"rope_type": "linear", "factor": model.rotary_scaling_factor}
    if model.rotary_scaling == "llama3":
        return {
            "rope_type": "llama3",
            "factor": model.rotary_scaling_factor,
            "low_freq_factor": model.rotary_low_freq_factor,
            "high_freq_factor": model.rotary_high_freq_factor,
            **original,
        }
    if model.rotary_scaling == "yarn":
        return {**_yarn(model), **original}
    if model.rotary_scaling == "longrope":
        return {**longrope, "short_factor": model.rotary_short_factors, "long_factor": model.rotary_long_factors}
    return None


def _yarn(model: ModelConfig) -> dict[str, Any]:
    said = {
        "attention_factor": model.rotary_attention_factor,
        "mscale": model.rotary_mscale,
        "mscale_all_dim": model.rotary_mscale_all_dim,
    }
    # vLLM reads none of these, but a factor on top of the usual one.
    beyond = model.attention_factor / yarn_attention_factor(model.rotary_scaling_factor, None, None)
    return {
        "rope_type": "yarn",
        "factor": model.rotary_scaling_factor,
        "beta_fast": model.rotary_beta_fast,
        "beta_slow": model.rotary_beta_slow,
        "truncate": model.rotary_truncate,
        **{key: value for key, value in said.items() if value is not None},
        **({} if beyond == 1.0 else {"attn_factor": beyond}),
    }


def _longrope_factors(model: ModelConfig, frequencies: torch.Tensor) -> list[float]:
    """Factors f with 1 / (f x base^(i / D)) = frequency in fp32, which is how they will be used.

    The nearest fp32 number may miss the frequency by its last place, which at position 100,000 is a visible angle; one
    of its neighbours mostly meets it.
    """
    channels = model.rotary_channels
    exponents = torch.arange(0, channels, 2, dtype=torch.int64).float() / channels
    powers = model.rotary_base**exponents
    up = down = (1.0 / (frequencies.double() * powers.double())).float()
    candidates = [up]
    for _ in range(3):
        up, down = torch.nextafter(up, torch.tensor(math.inf)), torch.nextafter(down, torch.tensor(0.0))
        candidates += [up, down]
    tried = torch.stack(candidates)
    misses = (1.0 / (tried * powers) - frequencies).abs()
    return tried.gather(0, misses.argmin(0, keepdim=True))[0].tolist()
