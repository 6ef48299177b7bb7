"""The operator in portable PyTorch, sparse in time and memory, on any device. It mirrors `ops.triton`.

| module | what |
|---|---|
| `summaries`, `routing` | summaries of blocks, and the past blocks that each query attends |
| `index` | entries sorted by kv block, padded to whole batches |
| `kv_heads` | the work of a call, cut into groups of kv heads |
| `causal`, `past` | own blocks and past blocks, forward and backward, on `tiles` |
| `row_sums` | sums of rows in one pass |
| `combine` | partial results of past blocks combined into those of rows |
| `attention` | the whole operator; autograd |
| `decode` | the newest tokens of a text against all of its keys |
| `backend` | the steps of this backend, for `ops.steps` |
"""

from moba_megatron.ops.gathered.attention import (
    accumulate,
    accumulate_backward,
    attend,
    attend_backward,
    attend_forward,
)
from moba_megatron.ops.gathered.combine import output_delta
from moba_megatron.ops.gathered.routing import select_past
from moba_megatron.ops.gathered.summaries import summarize

__all__ = [
    "accumulate",
    "accumulate_backward",
    "attend",
    "attend_backward",
    "attend_forward",
    "output_delta",
    "select_past",
    "summarize",
]
