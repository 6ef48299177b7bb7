"""F16 weights: old checkpoints have them, but training does not support F16."""

from __future__ import annotations

F16 = "F16"
"""The dtype, as safetensors writes it."""


def half_precision_note(precision: str) -> str:
    """A note on F16 weights that are trained in `training.precision`."""
    if precision == "bf16":
        return (
            "F16 weights are rounded to bf16, which needs no loss scaling, but has 8 bits of precision instead of 11; "
            "training.precision=fp32 keeps them"
        )
    return "F16 weights are trained in fp32, which keeps them"
