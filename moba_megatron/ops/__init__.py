"""MoBA as pure tensor functions: ints and tensors in, tensors out; needs nothing but torch.

`layout` says where blocks lie, `selection`, `summaries`, `selectors` and `routing` choose block ids, `reference` and
`gathered` attend given ids, `triton` does all of that on GPUs, `steps` names the functions of each backend, `merge`
joins partial attentions, `dense` is full causal attention, `adapters` reach other packages, `attention` is the operator
put together, `library` the same for tracers, `pairs` counts what it costs.
"""

from moba_megatron.ops.attention import moba_attention, select_blocks
from moba_megatron.ops.backends import backend_names, full_backend_names, resolve_backend, resolve_full_backend
from moba_megatron.ops.dense import full_attention

__all__ = [
    "backend_names",
    "full_attention",
    "full_backend_names",
    "moba_attention",
    "resolve_backend",
    "resolve_full_backend",
    "select_blocks",
]
