"""What a GPU would be asked to start: launches of our kernels, and of PyTorch's own operations.

On tensors without data, with the launches of `without_data.record_launches`. An operation of PyTorch counts once if it
computes or copies anything; views, metadata and memory without contents are free.

`PYTHONPATH=. python tests/launch_counts.py` prints the counts of docs/results/launches.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
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


SETTINGS = ((64, 16), (128, 8), (512, 3), (2048, 3), (4096, 12))


def layer_launches(launches: list[Any], tokens: int, block_size: int, top_k: int) -> dict[str, Counter[str]]:
    """Launches of one MoBA layer over one document, by part: `layout`, `routing`, `forward` and `backward`.

    N = 32 query heads, G = 8 key heads, D = 128, bf16, in the default workspace.

    Args:
        launches: what `without_data.record_launches` returned.
    """
    import moba_megatron.ops.triton as kernels
    from moba_megatron.ops.layout import block_layout

    q, k, v = (torch.empty(tokens, n, 128, dtype=torch.bfloat16, device="meta") for n in (32, 8, 8))
    found: dict[str, Counter[str]] = {}

    def count(part: str, call: Callable[[], Any]) -> Any:
        launches.clear()
        with Operations() as operations:
            result = call()
        found[part] = Counter(name for name, _ in launches) + operations.found
        return result

    layout = count("layout", lambda: block_layout(tokens, block_size, device="meta"))
    ids = count("routing", lambda: kernels.select_past(q, kernels.summarize(k, layout), layout, top_k - 1))
    out, lse = count("forward", lambda: kernels.attend_forward(q, k, v, ids, layout, 1.0))
    count("backward", lambda: kernels.attend_backward(out, q, k, v, out, lse, ids, layout, 1.0))
    return found


def main() -> None:
    """Print a line for each length and setting."""
    from without_data import kernels_on_meta

    with pytest.MonkeyPatch.context() as patch:
        launches = kernels_on_meta(patch)
        print("| T | B, K | passes | launches | layout | routing | forward | backward |\n" + "|---" * 8 + "|")
        for tokens in (2**13, 2**15, 2**17):
            for block_size, top_k in SETTINGS:
                found = layer_launches(launches, tokens, block_size, top_k)
                passes = f"{found['forward']['causal_fwd']} + {found['backward']['causal_dq']}"
                parts = " | ".join(str(part.total()) for part in found.values())
                total = sum(part.total() for part in found.values())
                print(f"| {tokens // 1024}K | {block_size}, {top_k} | {passes} | {total} | {parts} |")


if __name__ == "__main__":
    main()
