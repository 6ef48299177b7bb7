"""The operator by Triton kernels: the twin of the portable backend, step by step with the same contracts.

| module | what |
|---|---|
| `means` | block summaries, and the planes that 16-bit queries are scored against |
| `route` | scores and the best past blocks in one pass |
| `fragment` | which keys queries see, as tensors of boundaries |
| `index` | which query rows attend a unit: count, prefix sum, scatter; and work lists |
| `units` | forward of units: gathered query rows against their keys |
| `own` | forward of own blocks, and the merge |
| `backward_keys`, `piece_sums` | dk and dv, summed in order |
| `backward_queries` | delta, dq |
| `attention` | all of it put together, in passes that fit a workspace; autograd |
| `decoding` | one query per sequence against cached keys, values and summaries |
| `config`, `tile_table` | launch settings |
| `catalog` | all of these, for compiling ahead of time |

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
