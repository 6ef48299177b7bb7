"""What megatron-core says at import on a machine without its optional libraries; `doctor` says it once, with the
mend."""

from __future__ import annotations

import warnings


def silence_missing_libraries() -> None:
    """Filter megatron-core's warnings that Transformer Engine and apex are not installed, and of names that it itself
    will have to change. Call before importing it."""
    for message in (".*Apex (is|are) not installed", ".*dynamic_context", "full scope is deprecated"):
        warnings.filterwarnings("ignore", message=message, module="megatron")
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="megatron")
