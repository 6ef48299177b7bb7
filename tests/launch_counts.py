"""What a GPU would be asked to start: launches of our kernels, and of PyTorch's own operations.

On tensors without data, with the launches of `without_data.record_launches`. An operation of PyTorch counts once if it
computes or copies anything; views, metadata and memory without contents are free.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh"}


def is_free(operation: torch._ops.OpOverload) -> bool:
    """Whether an operation starts nothing on a device."""
    if operation.overloadpacket.__name__ in FREE:
        return True
    arguments = operation._schema.arguments
    return any(x.alias_info is not None and not x.alias_info.is_write for x in arguments) and not any(
        x.alias_info is not None and x.alias_info.is_write for x in arguments
    )


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch on the device "meta" in its `with` block, as "aten.NAME"."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        made = any(isinstance(x, torch.Tensor) and x.is_meta for x in (*args, *results))
        if made and not is_free(func):
            self.found[f"aten.{func.overloadpacket.__name__}"] += 1
        return out
