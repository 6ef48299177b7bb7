"""What travels with a microbatch to the index of a layer: its queries and keys, and which tokens its loss counts.

Only the last pipeline stage has a loss of the language model, but each has layers with an index. So every stage hands
the loss mask of its batch to its layers, within the boundaries of documents (`PackedSeqParams`), which megatron-core
gives to every layer and keeps for recomputation. A batch of whole sequences has no boundaries; it gets them with the
format "sbhd" and nothing else, which means that there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moba_megatron.ops.router import Router, RouterLoss


@dataclass(frozen=True)
class IndexInputs:
    """What an index gives to its layer's core attention.

    Attributes:
        query, key: [s, b, heads, dim] and [s, b, key heads, dim]; of a pack [t, heads, dim] and [t, key heads, dim].
        loss_mask: [b, s], 1 where the loss of a token counts; None where there is no loss.
        loss: what the index learns from where gradients are on: `none`, `sparse` or `dense`.
        attach: called with the attention's output [t, np, hn] and its `RouterLoss`; returns the output with the loss
            attached.
    """

    query: Tensor
    key: Tensor
    loss_mask: Tensor | None
    loss: str
    attach: Callable[[Tensor, RouterLoss], Tensor]

    def as_router(self) -> Router:
        """The operator's argument; query and key are [t, heads, dim].

        Raises:
            ValueError: there is a loss, and no loss mask.
        """
        loss = self.loss if torch.is_grad_enabled() else "none"
        if loss == "none":
            return Router(self.query, self.key)
        if self.loss_mask is None:
            raise ValueError(
                "attention.router = index learns from the tokens of the loss mask, but this batch brought none: pass "
                "the boundaries of documents by `with_loss_mask`, or run it without gradients"
            )
        return Router(self.query, self.key, loss, self.loss_mask.flatten())

    def learned(self, result: Any, router: Router) -> Tensor:
        """The attention's output, with the loss attached where there is one.

        Args:
            result: of the operator, called with this router.
        """
        return self.attach(*result) if router.loss != "none" else result


@dataclass
class MaskedSeqParams(PackedSeqParams):
    """Boundaries of documents, with the loss mask [b, s] of the tokens."""

    loss_mask: Tensor | None = None


def with_loss_mask(packed: PackedSeqParams | None, loss_mask: Tensor) -> MaskedSeqParams:
    """The same boundaries, with a loss mask; None: sequences without."""
    if packed is None:
        return MaskedSeqParams(qkv_format="sbhd", loss_mask=loss_mask)
    return MaskedSeqParams(**{field.name: getattr(packed, field.name) for field in fields(packed)}, loss_mask=loss_mask)


def loss_mask_of(packed: PackedSeqParams | None) -> Tensor | None:
    return packed.loss_mask if isinstance(packed, MaskedSeqParams) else None


def learn_blocks(transformer: TransformerConfig) -> None:
    """Note that layers of this configuration have an index with a loss, so that batches bring their loss mask."""
    transformer.learns_blocks = True


def learns_blocks(transformer: TransformerConfig) -> bool:
    return getattr(transformer, "learns_blocks", False)
