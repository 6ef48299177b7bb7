"""The operator by Triton kernels. It mirrors `ops.gathered`, module by module with the same contracts.

| module | what |
|---|---|
| `summaries` | block summaries, and the planes that 16-bit queries are scored against |
| `routing` | scores and the best past blocks in one pass |
| `fragments` | which keys queries see, as tensors of boundaries |
| `passes` | the work of a call, cut to fit a workspace |
| `index` | entries sorted by (kv head, kv block): count, prefix sums, scatter |
| `splits` | entries and spans cut into the work of programs |
| `past`, `causal` | forward of past blocks and of own blocks |
| `backward_dkdv`, `backward_dq` | delta, dk, dv and dq of both |
| `combine` | partial results combined, in order |
| `attention` | the whole operator; autograd |
| `decode` | one query per sequence against cached keys, values and summaries |
| `backend` | the steps of this backend, for `ops.steps` |
| `common`, `config`, `tile_table` | what kernels share, and their launch settings |
| `catalog`, `compiled` | every configuration, and what it compiles to without a GPU |

Runs on CUDA devices, and on CPU tensors in Triton's interpreter (`TRITON_INTERPRET=1`, set before Triton is imported).
"""

from moba_megatron.ops.triton.attention import (
    accumulate,
    accumulate_backward,
    attend,
    attend_backward,
    attend_forward,
)
from moba_megatron.ops.triton.backward_dq import output_delta
from moba_megatron.ops.triton.decode import complete_summaries, decode_cached
from moba_megatron.ops.triton.fragments import DeviceFragment, on_device, whole_pack
from moba_megatron.ops.triton.routing import select_past
from moba_megatron.ops.triton.summaries import summarize

__all__ = [
    "DeviceFragment",
    "accumulate",
    "accumulate_backward",
    "attend",
    "attend_backward",
    "attend_forward",
    "complete_summaries",
    "decode_cached",
    "on_device",
    "output_delta",
    "select_past",
    "summarize",
    "whole_pack",
]
