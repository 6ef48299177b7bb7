"""MoBA as pure tensor functions: ints and tensors in, tensors out; needs nothing but torch.

`layout` says where blocks lie, `summaries` and `selectors` and `routing` choose block ids, `reference` and `gathered`
attend given ids, `merge` joins partial attentions, `dense` is full causal attention, `attention` is the operator put
together.
"""

from moba_megatron.ops.attention import moba_attention, select_blocks
from moba_megatron.ops.backends import backend_names, resolve_backend
from moba_megatron.ops.dense import full_attention

__all__ = ["backend_names", "full_attention", "moba_attention", "resolve_backend", "select_blocks"]
