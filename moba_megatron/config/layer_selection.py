"""Checks of how single layers choose their blocks: `attention.layers.N` beside the section's own settings."""

from __future__ import annotations

from moba_megatron.config.attention import AttentionConfig, AttentionStage, LayerAttentionOverride

_USE_SCORES = ("top_k", "threshold")


def layer_selection_checks(
    attention: AttentionConfig, kv_heads: int | None, kv_heads_key: str
) -> list[tuple[bool, str]]:
    """(wrong, what to say) for each setting of a layer that cannot work.

    Args:
        kv_heads: key heads of a layer, where that is known.
        kv_heads_key: what that is called where the user sets it.
    """
    checks = []
    for key, layer in attention.overrides.items():
        selector = layer.selector or _stage_of(attention, key).selector or attention.selector
        scored = selector in _USE_SCORES
        budgets = layer.top_k if isinstance(layer.top_k, list) else None
        checks += [
            (
                budgets is not None and kv_heads is not None and len(budgets) != kv_heads,
                f"{key}.top_k = {budgets} has {len(budgets or ())} entries, but {kv_heads_key} = {kv_heads}: give one "
                "number for each key head, or one for all",
            ),
            (budgets == [], f"{key}.top_k = []: give one number for each key head, or one for all"),
            (
                layer.summary is not None and layer.summary != "mean" and not scored,
                f"{key}.summary = {layer.summary} has no effect with the selector {selector}, which uses no scores: "
                "take it out",
            ),
            (
                layer.summary == "min_max" and attention.router == "index",
                f"{key}.summary = min_max: attention.router = index scores means of its keys: use mean",
            ),
            (
                layer.threshold is not None and selector != "threshold",
                f"{key}.threshold = {layer.threshold} has no effect with the selector {selector}: set {key}.selector: "
                "threshold, or take it out",
            ),
        ]
    return checks


def lacks_threshold(attention: AttentionConfig) -> bool:
    """Whether some layer has the selector `threshold` and none gives it a share."""
    if attention.threshold is not None or "threshold" not in attention.selectors:
        return False
    if "threshold" in {attention.selector, *(stage.selector for stage in attention.stages)}:
        return True
    return any(_asks(layer) and layer.threshold is None for layer in attention.overrides.values())


def _asks(layer: LayerAttentionOverride) -> bool:
    return layer.selector == "threshold"


def _stage_of(attention: AttentionConfig, key: str) -> AttentionConfig | AttentionStage:
    """The part of the section that a layer's key lies in."""
    parts = key.split(".")
    return attention.stages[int(parts[2])] if parts[1] == "stages" else attention
