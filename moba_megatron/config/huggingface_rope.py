"""The rotary embedding of a Hugging Face `config.json` as our `model` section.

There are two formats: transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`. Both are
read. A file may have both if they agree.
"""

from __future__ import annotations

from typing import Any

from moba_megatron.config.checks import ConfigError
from moba_megatron.config.family import MOBA_IN_TRANSFORMERS, Family, Values
from moba_megatron.config.model import longrope_attention_factor


def rotary_section(values: Values, family: Family) -> dict[str, Any]:
    """The settings of the rotary embedding in our `model` section.

    Raises:
        ConfigError: one that is not supported, or two entries that contradict each other.
    """
    rope = _rope(values, family)
    kind = rope.get("rope_type", "default")
    kind = family.rope_names.get(kind, kind)
    part = rope.get("partial_rotary_factor", 1.0)
    problems = []
    if part != 1.0 and "rotary_percent" not in family.may:
        problems.append(
            f"partial_rotary_factor = {part}: {family.architecture} rotates whole heads; {MOBA_IN_TRANSFORMERS}"
        )
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": (),
        "longrope": ("short_factor", "long_factor"),
    }
    if kind not in needed:
        problems.append(
            f"rope_type = {kind!r} is not one of {', '.join(needed)}: take it out of config.json and extend the model "
            "by one of these (model.rotary_scaling = yarn)"
        )
    elif ("none" if kind == "default" else kind) not in family.scalings:
        problems.append(f"rope_type = {kind!r}: {family.architecture} of transformers does not take it")
    problems += [
        f"rope_type = {kind!r} without {key}: add it to config.json"
        for key in needed.get(kind, ())
        if not rope.get(key)
    ]
    if problems:
        raise ConfigError([f"config.json: {line}" for line in problems])
    section: dict[str, Any] = {
        "rotary_base": rope["rope_theta"],
        "rotary_scaling": "none" if kind == "default" else kind,
        **({"rotary_percent": part} if "rotary_percent" in family.may else {}),
    }
    original = values.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original = original or values["max_position_embeddings"]
    if kind in ("linear", "llama3"):
        section["rotary_scaling_factor"] = rope["factor"]
    if kind in ("llama3", "yarn", "longrope"):
        section["rotary_original_length"] = original
    if kind == "llama3":
        section["rotary_low_freq_factor"] = rope["low_freq_factor"]
        section["rotary_high_freq_factor"] = rope["high_freq_factor"]
    if kind == "yarn":
        section |= _yarn_section(rope, values["max_position_embeddings"] / original)
    if kind == "longrope":
        section["rotary_short_factors"] = rope["short_factor"]
        section["rotary_long_factors"] = rope["long_factor"]
        section["rotary_attention_factor"] = _longrope_attention_factor(rope, values, original)
    return section


def _yarn_section(rope: dict[str, Any], implied: float) -> dict[str, Any]:
    """Settings of `yarn`, with the defaults of transformers if a number is missing, null or 0.

    Args:
        implied: the factor where none is said: the new length over the old one.
    """
    factor = rope.get("factor") or implied
    section = {
        "rotary_scaling_factor": factor,
        "rotary_beta_fast": rope.get("beta_fast") or 32.0,
        "rotary_beta_slow": rope.get("beta_slow") or 1.0,
        "rotary_truncate": rope.get("truncate", True),
    }
    given, mscales = rope.get("attention_factor"), (rope.get("mscale"), rope.get("mscale_all_dim"))
    if given is None:
        mscales = mscales if all(mscales) else (None, None)
    elif given == 1.0 and factor > 1:
        # Our 1.0 may be left of a model without yarn, and is not taken.
        given, mscales = None, (1.0, 1.0)
    else:
        mscales = (None, None)
    return {
        **section,
        "rotary_attention_factor": given,
        "rotary_mscale": mscales[0],
        "rotary_mscale_all_dim": mscales[1],
    }


def _rope(values: Values, family: Family) -> dict[str, Any]:
    """The rotary embedding from either format, with the keys of transformers 5."""
    said = []
    for key in ("rope_parameters", "rope_scaling"):
        if values.get(key):
            rope = {"rope_type": values[key].get("type", "default"), **values[key]}
            if any(isinstance(value, dict) for value in rope.values()):
                raise ConfigError(
                    [f"config.json: {key} differs from layer to layer, which is not supported; {MOBA_IN_TRANSFORMERS}"]
                )
            rope.pop("type", None)
            said.append({name: value for name, value in rope.items() if value is not None})
    outside = {name: values[name] for name in ("rope_theta", "partial_rotary_factor") if name in values}
    if outside:
        said.append(outside)
    merged: dict[str, Any] = {}
    for rope in said:
        differing = [name for name in rope if name in merged and merged[name] != rope[name]]
        if differing:
            raise ConfigError(
                [f"config.json says {name} = {merged[name]!r} and = {rope[name]!r}: keep one" for name in differing]
            )
        merged.update(rope)
    return {"rope_theta": family.rope_theta, **merged}


def _longrope_attention_factor(rope: dict[str, Any], values: Values, original: int) -> float:
    """As given, else by the rule of the paper."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    factor = rope.get("factor") or values["max_position_embeddings"] / original
    return longrope_attention_factor(factor, original)
