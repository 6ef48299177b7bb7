"""The cost of an index that chooses blocks (`attention.router: index`), from its sizes.

t tokens, H index queries and J index keys of C channels in a layer, hidden h, N query heads of size D, e bytes an
element:

| what | cost |
|---|---|
| projections | 2 h (H + J) C operations a token, and as many for the weights' gradients; none for the hidden states |
| scores | those of MoBA, for H heads of size C |
| sparse loss, where it learns | for each chosen block of a token and head 6 C operations; its summary is read twice |
| dense loss | full attention's scores, 2 D N a pair, and 6 C for each past block |
| kept for the backward pass | queries and keys, also before norm and rotation, 3 t (H + J) C e; 4 bytes a score |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moba_megatron.ops.pairs import attended_pairs, chosen_blocks, scored_pairs

if TYPE_CHECKING:
    from moba_megatron.config import AttentionConfig, ModelConfig

_OF_SCORE = 6


@dataclass(frozen=True)
class IndexShape:
    """The index of a layer on one tensor-parallel rank.

    Attributes:
        queries, keys: H and J.
        size: C.
        loss: `none`, `sparse` or `dense`.
    """

    queries: int
    keys: int
    size: int
    loss: str

    @classmethod
    def of(cls, attention: AttentionConfig, model: ModelConfig, tensor: int = 1) -> IndexShape | None:
        """That of a configuration, None without; `tensor` ranks split the heads."""
        if attention.router == "own" or attention.router_dim is None:
            return None
        queries = model.query_groups if attention.router_heads == "key" else model.num_attention_heads
        keys = 1 if attention.router_keys == "shared" else model.query_groups // tensor
        return cls(queries // tensor, keys, attention.router_dim, attention.router_loss)

    @property
    def width(self) -> int:
        """Channels of all queries and keys."""
        return (self.queries + self.keys) * self.size

    def training_flops(self, model: ModelConfig, length: int, block_size: int, top_k: int | tuple[int, ...]) -> float:
        """Operations of one layer for one document of `length` tokens, forward and backward; scores left out, as
        MoBA's own are."""
        learns = self.loss != "none"
        projections = 2 * model.hidden_size * self.width * length * (2 if learns else 1)
        if self.loss == "sparse":
            return projections + _OF_SCORE * self.size * self.queries * float(chosen_blocks(length, block_size, top_k))
        if self.loss == "dense":
            scores = 2 * model.head_size * model.num_attention_heads * attended_pairs(length)
            return projections + scores + _OF_SCORE * self.size * self.queries * scored_pairs(length, block_size)
        return projections

    def kept_bytes(self, tokens: int, element_bytes: int) -> int:
        """Of the index queries and keys of a layer."""
        return 3 * tokens * self.width * element_bytes if self.loss != "none" else 0

    def loss_bytes(self, tokens: int, past: int, blocks: int) -> int:
        """Gradients of the scores that a loss keeps.

        Args:
            past: chosen past blocks of a token.
            blocks: of a document.
        """
        slots = {"none": 0, "sparse": past, "dense": blocks}[self.loss]
        return 4 * tokens * self.queries * slots
