"""MoBA as pure tensor functions: ints and tensors in, tensors out; needs nothing but torch.

`attention` is the whole operator, and `decode` is the operator in generation. `backends` names what can compute it:
`reference`, which is the definition; the folders `gathered` (portable PyTorch) and `triton` (GPU kernels), which mirror
each other module by module; and `adapters` to other packages. `steps` are the parts that both folders have, `library`
the same for tracers. `layout` says where blocks lie (`kept_layouts`: once for all layers of a microbatch). `selection`,
`summaries` and `selectors` choose blocks, or a `router` does, which learns by `router_loss` or `dense_loss`.
`fragments` says which keys queries see, `combine` joins partial attentions, `dense` is full causal attention, and
`pairs` counts the cost.

The words of these modules, portable and Triton alike:

| word | meaning |
|---|---|
| block | `block_size` adjacent tokens of a document, the last one perhaps shorter: what a query chooses |
| span | adjacent rows, from start to end - 1, as cu_seqlens bounds documents |
| kv block | adjacent key rows that a query attends whole or not at all: a block, in a whole pack; under context |
| | parallelism the part of a block that this rank holds |
| causal span | adjacent rows that attend themselves causally: in a whole pack the queries' own blocks |
| fragment | some keys as some queries see them: kv blocks and causal spans |
| kv head | a head of keys and values, also key head; `qheads_per_kvhead` query heads attend it |
| row | a query row, token * N + head |
| slot | place of a row's ids, or of those at hand; one more where its own block has a kv block before it |
| entry | one (query row, kv block) that is attended; the kernels number all slots, with kv block -1 for none |
| head block | a (kv head, kv block), numbered kv_head * num_kv_blocks + kv_block |
| index | entries sorted by head block: their `order` and the offsets `cu_entries`, as cu_seqlens has for documents |
| pass | some kv heads and a range of tokens, whose entries fit the workspace (Triton) |
| split | what one program takes of a kv block's entries, of a causal span's rows, or, in decoding, of a block |
| tile | the rows and keys that a program or a product holds at a time |
| partial | result over some of the keys (`partial_out`, `partial_lse`, `partial_dq`), or over some of the rows |
| combine | to join partial results: outputs by log-sum-exp, gradients by sums in a fixed order |
| `s`, `p` | scores, and their exponentials or probabilities; as in FlashAttention, like all that follow |
| `m`, `l`, `acc` | running maximum and sum of exponentials of a row's scores, and its output before the division by l |
| `alpha` | the factor that rescales l and acc when m rises |
| `lse`, `delta` | log-sum-exp of a row, and inner product of its output and the output's gradient |
| `do`, `dp`, `ds` | gradients of output, p and s; dq, dk and dv likewise |

Shapes are suffixes of names: T query tokens, S key rows, N query heads, G kv heads, D head size, M blocks of a pack, K
past blocks per query (`top_k` - 1), E entries; B is the block size. `q_TND` is [T, N, D].
"""

from moba_megatron.ops.attention import moba_attention, select_blocks
from moba_megatron.ops.backends import backend_names, full_backend_names, resolve_backend, resolve_full_backend
from moba_megatron.ops.dense import full_attention
from moba_megatron.ops.router import Router, RouterLoss

__all__ = [
    "Router",
    "RouterLoss",
    "backend_names",
    "full_attention",
    "full_backend_names",
    "moba_attention",
    "resolve_backend",
    "resolve_full_backend",
    "select_blocks",
]
