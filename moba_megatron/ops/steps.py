"""The steps of MoBA: what a backend that is sparse in time and memory is made of.

Two backends have them: `gathered.backend.GatheredSteps` and `triton.backend.TritonSteps`. The contracts are written
down at the functions of `gathered` and hold for both. Attention knows only ids: the kernels choose by top-k of the
means alone and leave every other selection to the portable routing, which runs on any device.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moba_megatron.ops.fragments import Fragment, Keys
from moba_megatron.ops.gathered.backend import GatheredSteps
from moba_megatron.ops.layout import BlockLayout, TokenBlocks
from moba_megatron.ops.selection import MOBA, Selection
from moba_megatron.ops.summaries import Summary


class Steps(Protocol):
    """The steps of one backend for one selection.

    Attributes:
        summary: what a block shows of its keys; None where nothing is asked for.
    """

    summary: Summary | None

    def summarize(self, k_TGD: Tensor, layout: BlockLayout) -> Tensor | None:
        """Summaries of blocks, see `gathered.summaries`."""
        ...

    def select_past(self, q_TND: Tensor, summaries_MGD: Tensor | None, layout: TokenBlocks, num_past: int) -> Tensor:
        """Ids of the past blocks that each query attends, see `gathered.routing`."""
        ...

    def attend(
        self,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        ids_TNK: Tensor,
        layout: BlockLayout,
        softmax_scale: float,
        workspace_bytes: int | None = None,
        block_lse_TNK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention with given ids in a whole pack, differentiable, see `gathered.attention`."""
        ...

    def attend_forward(
        self,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        ids_TNK: Tensor,
        layout: BlockLayout,
        softmax_scale: float,
        workspace_bytes: int | None = None,
        block_lse_TNK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The forward half of `attend`."""
        ...

    def attend_backward(
        self,
        do_TND: Tensor,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        out_TND: Tensor,
        lse_TN: Tensor,
        ids_TNK: Tensor,
        layout: BlockLayout,
        softmax_scale: float,
        workspace_bytes: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The backward half of `attend`."""
        ...

    def accumulate(
        self,
        q_TND: Tensor,
        keys: Keys,
        ids_TNK: Tensor,
        fragment: Fragment,
        softmax_scale: float,
        out_TND: Tensor,
        lse_TN: Tensor,
        workspace_bytes: int | None = None,
        block_lse_TNK: Tensor | None = None,
    ) -> None:
        """Attention of a fragment of the keys, combined with the rest, see `gathered.attention`."""
        ...

    def accumulate_backward(
        self,
        do_TND: Tensor,
        q_TND: Tensor,
        keys: Keys,
        ids_TNK: Tensor,
        fragment: Fragment,
        softmax_scale: float,
        out_TND: Tensor | None,
        lse_TN: Tensor,
        delta_TN: Tensor,
        dq_TND: Tensor,
        dk_SGD: Tensor,
        dv_SGD: Tensor,
        workspace_bytes: int | None = None,
    ) -> None:
        """Gradients of one `accumulate`."""
        ...

    def output_delta(self, do_TND: Tensor, out_TND: Tensor) -> Tensor:
        """Inner products of the output and its gradient, for the backward pass of fragments."""
        ...


def has_steps(backend: str) -> bool:
    """Whether a backend is made of these steps; others take whole calls only.

    >>> has_steps("gathered"), has_steps("reference")
    (True, False)
    """
    return backend in ("gathered", "triton")


def check_workspace(backend: str, workspace_bytes: int | None) -> None:
    """Refuse a workspace for a backend that cannot be kept to one. Raises ValueError."""
    if workspace_bytes is not None and not has_steps(backend):
        raise ValueError(
            f"workspace_bytes = {workspace_bytes}: backend {backend!r} cannot be kept to a workspace; leave it out, or "
            "use triton or gathered"
        )


def steps_of(backend: str, selection: Selection = MOBA) -> Steps:
    """The steps of a backend for which `has_steps` holds."""
    assert has_steps(backend), backend
    if backend == "gathered":
        return GatheredSteps(selection)
    # Only here: Triton exists on Linux alone.
    from moba_megatron.ops.triton.backend import TritonSteps

    return TritonSteps(selection)
