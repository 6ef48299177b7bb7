"""Bytes that the experts of one layer keep for its backward pass, and the extra bytes while it runs, computed from
sizes.

Found by listing the tensors that autograd saves in megatron-core's layers, and compared with measured peaks. t tokens
of a rank, K of E experts for each, r = t K rows (`expert_shape`), hidden h, expert width f, e bytes an element and p of
a router's score. What one layer keeps, its shared expert aside:

| what | GPU (grouped products) | CPU (one expert after the other) |
|---|---|---|
| rows by expert, the input of the first product | r h e | the same |
| gate and up, then the weighted product (CPU: their parts, and the product without weights) | 3 r f e | 6 r f e |
| weights of rows, and where they come from | r (p + 8) | the same |
| the router: choices, a map of all scores, scores for each loss | t K (8 + p) + t E (p + 1 + 4) | the same |

On the way to the experts and back rows are copied, and the caller of each copy still holds what it was made from. So
the forward pass of the last layer needs more than any backward pass: with `alltoall` the rows that were sent and those
that have arrived, what the experts gave, and that in the order of the ranks. `flex` needs no more. With `allgather` the
tokens of all ranks stand for the former two.
"""

from __future__ import annotations

from moba_megatron.planning.expert_shape import ExpertShape


def expert_layer_bytes(shape: ExpertShape, cuda: bool) -> int:
    """Bytes that the experts and the router of one layer keep."""
    row = shape.row_bytes + (3 if cuda else 6) * shape.ffn * shape.width + shape.score_bytes + 8
    choice = 8 + shape.score_bytes
    score = shape.score_bytes + 1 + 4 * shape.losses
    return shape.rows * row + shape.tokens * (shape.top_k * choice + shape.experts * score)


def expert_working_bytes(shape: ExpertShape) -> int:
    """Extra bytes in memory at once in the experts of one layer."""
    # A rank with one expert needs no order of experts: what has arrived is what it keeps.
    several = shape.local > 1
    back = shape.rows * shape.row_bytes * (1 + several)
    if shape.dispatcher == "allgather" and shape.group > 1:
        return back + shape.group * shape.tokens * (shape.row_bytes + shape.experts * shape.score_bytes)
    return back + shape.sent * shape.row_bytes * (1 + (several and shape.group > 1))
