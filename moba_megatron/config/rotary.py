"""Settings of the rotary embedding that contradict each other or have no effect."""

from __future__ import annotations

from moba_megatron.config.model import ModelConfig

Check = tuple[bool, str]
"""(wrong, what to say)."""

# The kinds of scaling that read a setting, and its default value. Those of llama3 and the original length are not here:
# models of any kind have always had them at other values.
_READ_BY: dict[str, tuple[tuple[str, ...], object]] = {
    "rotary_scaling_factor": (("linear", "llama3", "yarn"), 1.0),
    "rotary_beta_fast": (("yarn",), 32.0),
    "rotary_beta_slow": (("yarn",), 1.0),
    "rotary_truncate": (("yarn",), True),
    "rotary_mscale": (("yarn",), None),
    "rotary_mscale_all_dim": (("yarn",), None),
    "rotary_short_factors": (("longrope",), None),
    "rotary_long_factors": (("longrope",), None),
}


def rotary_checks(model: ModelConfig) -> list[Check]:
    """Settings of the rotary embedding that cannot work together: (wrong, what to say) for each."""
    scaling = model.rotary_scaling
    low, high = model.rotary_low_freq_factor, model.rotary_high_freq_factor
    return [
        (
            model.head_size % 2 != 0,
            f"size of a head = {model.head_size}: rotary embedding needs an even one; set model.kv_channels",
        ),
        *_part_checks(model),
        *_without_effect(model),
        (
            scaling == "llama3" and low >= high,
            f"model.rotary_low_freq_factor = {low} must be below model.rotary_high_freq_factor = {high}",
        ),
        *_yarn_checks(model),
        *_longrope_checks(model),
        (
            scaling in ("none", "linear") and model.rotary_interpolation != 1.0,
            f"model.rotary_interpolation = {model.rotary_interpolation} with model.rotary_scaling = {scaling}: set "
            f"model.rotary_scaling = linear and put the whole factor into model.rotary_scaling_factor",
        ),
    ]


def _part_checks(model: ModelConfig) -> list[Check]:
    """Which channels and which layers are rotated."""
    channels, skipped = model.rotary_channels, model.no_rope_freq
    shown = f"model.no_rope_freq = {skipped}"
    return [
        (
            model.head_size % 2 == 0 and (channels % 2 != 0 or channels == 0),
            f"model.rotary_percent = {model.rotary_percent} rotates {channels} of {model.head_size} channels: it must "
            "be an even number above 0",
        ),
        (
            skipped is not None and len(skipped) != model.num_layers,
            f"{shown} has {len(skipped or [])} entries, but model.num_layers = {model.num_layers}: give one for each",
        ),
        (
            skipped is not None and not set(skipped) <= {0, 1},
            f"{shown}: an entry is 1 (no rotary embedding) or 0",
        ),
        (skipped is not None and not any(skipped), f"{shown} skips no layer: leave it out"),
    ]


def _without_effect(model: ModelConfig) -> list[Check]:
    scaling = model.rotary_scaling
    found = [
        (
            scaling not in kinds and getattr(model, key) != unused,
            f"model.{key}{_shown(getattr(model, key))} has no effect with model.rotary_scaling = {scaling}: it belongs "
            f"to {' and '.join([', '.join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)}",
        )
        for key, (kinds, unused) in _READ_BY.items()
    ]
    # Files of earlier versions have 1.0 for every model.
    factor = model.rotary_attention_factor
    found.append((
        scaling not in ("yarn", "longrope") and factor not in (None, 1.0),
        f"model.rotary_attention_factor = {factor} has no effect with model.rotary_scaling = {scaling}: it belongs to "
        "yarn and longrope",
    ))  # fmt: skip
    return found


def _shown(value: object) -> str:
    return "" if isinstance(value, list) else f" = {value}"


def _yarn_checks(model: ModelConfig) -> list[Check]:
    if model.rotary_scaling != "yarn":
        return []
    fast, slow, factor = model.rotary_beta_fast, model.rotary_beta_slow, model.rotary_attention_factor
    mscales = (model.rotary_mscale, model.rotary_mscale_all_dim)
    usual = model.model_copy(update={"rotary_attention_factor": None}).attention_factor
    return [
        (fast < slow, f"model.rotary_beta_fast = {fast} must not be below model.rotary_beta_slow = {slow}"),
        (model.rotary_base <= 1, f"model.rotary_base = {model.rotary_base}: yarn needs one above 1"),
        (
            mscales.count(None) == 1,
            f"model.rotary_mscale = {mscales[0]} and rotary_mscale_all_dim = {mscales[1]}: one has no effect without "
            "the other; set both or none",
        ),
        (
            factor == 1.0 and usual != 1.0,
            "model.rotary_attention_factor = 1.0 with model.rotary_scaling = yarn may be left over from a model "
            "without yarn: "
            f"set it to null for {usual:.6g}, as the paper has it, or set rotary_mscale and rotary_mscale_all_dim to "
            "1.0 for scores that do not grow",
        ),
        (
            factor not in (None, 1.0) and mscales != (None, None),
            f"model.rotary_mscale has no effect beside model.rotary_attention_factor = {factor}: set one of them",
        ),
    ]


def _longrope_checks(model: ModelConfig) -> list[Check]:
    factors = (model.rotary_short_factors, model.rotary_long_factors)
    pairs = model.rotary_channels // 2
    wrong_lengths = [f"{len(values)}" for values in factors if values is not None and len(values) != pairs]
    return [
        (
            model.rotary_scaling == "longrope" and None in factors,
            "model.rotary_scaling = longrope needs model.rotary_short_factors and model.rotary_long_factors",
        ),
        (
            bool(wrong_lengths),
            f"model.rotary_short_factors and rotary_long_factors have {' and '.join(wrong_lengths)} entries: give "
            f"{pairs}, half the rotated channels of a head",
        ),
        (
            any(value <= 0 for values in factors for value in values or []),
            "model.rotary_short_factors and rotary_long_factors must be above 0",
        ),
    ]
