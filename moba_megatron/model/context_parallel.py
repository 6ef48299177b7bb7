"""Context parallelism at the seam to megatron-core: which ranks share a sequence, and how they exchange.

megatron-core hands over its groups with the layer (`ProcessGroupCollection.cp`, and `hcp` for the two levels of
`a2a+p2p`) or with the batch (`PackedSeqParams.cp_group`, which wins). Nothing is assumed about where the ranks of a
group are.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from moba_megatron.model.exchange_choice import exchange_of_kind
from moba_megatron.model.index_inputs import IndexInputs
from moba_megatron.model.schedule import LayerAttention
from moba_megatron.parallel.attention import ContextGroups, context_attention
from moba_megatron.parallel.exchange_kind import RankSizes
from moba_megatron.parallel.exchanges import EXCHANGES
from moba_megatron.parallel.layout import check_positions

logger = logging.getLogger(__name__)


class ContextParallel:
    """The work of a core attention whose sequence is on several ranks.

    Args:
        config, pg_collection: as megatron-core passes them to a core attention. Without a collection its global groups
            are taken, as megatron-core itself does.
        exchange: `auto` or a name in `EXCHANGES`, for both kinds of layers or by kind (`moba`, `full`).
        backend: what computes MoBA.
        workspace_bytes: of every layer, see `moba_attention`.

    Raises:
        ValueError: an unknown exchange or kind, or the reference backend with another exchange than `a2a`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None,
        exchange: str | Mapping[str, str],
        backend: str,
        workspace_bytes: int | None = None,
    ):
        self.exchange = _by_kind(exchange)
        self.backend = backend
        self.workspace_bytes = workspace_bytes
        self._layer_groups: ContextGroups | None = None
        if config.context_parallel_size > 1:
            if backend == "reference" and self.exchange["moba"] not in ("auto", "a2a"):
                raise ValueError(
                    f"backend = reference runs under context parallelism with a2a only, not with exchange = "
                    f"{self.exchange['moba']}: use a2a, or the backend gathered"
                )
            self._layer_groups = _layer_groups(config, pg_collection)

    def cp_groups(self, packed_seq_params: PackedSeqParams | None) -> ContextGroups | None:
        """The ranks that share the sequence of this call; None where one rank has all of it."""
        cp_groups = self._layer_groups
        given = None if packed_seq_params is None else packed_seq_params.cp_group
        if given is not None and (cp_groups is None or given is not cp_groups.whole):
            cp_groups = ContextGroups(given)
        return None if cp_groups is None or cp_groups.whole.size() == 1 else cp_groups

    def attend(
        self,
        layer: LayerAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        *,
        cp_groups: ContextGroups,
        softmax_scale: float | None,
        index: IndexInputs | None = None,
    ) -> Tensor:
        """Attend as `layer` says: q [t, np, hn], k and v [t, ng, hn] of this rank's tokens -> [t, np, hn].

        Args:
            cu_seqlens: padded boundaries of the whole pack; None: one sequence.
            index: what chooses the blocks, of the same tokens.
        """
        exchange = self.exchange[layer.kind]
        if exchange == "auto" or (layer.kind == "full" and not EXCHANGES[exchange].suits_full):
            sizes = RankSizes(
                tokens=q.shape[0],
                heads=q.shape[1],
                kv_heads=k.shape[1],
                head_size=q.shape[2],
                element_bytes=q.element_size(),
                block_size=layer.block_size,
                top_k=layer.top_k,
            )
            exchange = _decide(layer.kind, exchange, sizes, cp_groups, self.backend)
        how = {
            "cp_groups": cp_groups,
            "exchange": exchange,
            "block_size": layer.block_size,
            "top_k": layer.top_k,
            "softmax_scale": softmax_scale,
            "backend": self.backend,
            "selection": layer.selection,
            "workspace_bytes": self.workspace_bytes,
        }
        if index is None:
            return context_attention(q, k, v, cu_seqlens, **how)
        router = index.as_router()
        return index.learned(context_attention(q, k, v, cu_seqlens, router=router, **how), router)

    def __str__(self) -> str:
        return f"exchange={self.exchange}"


def check_layout(
    position_ids: Tensor, packed_seq_params: PackedSeqParams | None, cp_group: ProcessGroup | None
) -> None:
    """Check that a batch has the zigzag layout that rotary embedding and attention assume. One rank needs no check.

    Args:
        position_ids: [b, s / C] of this rank's tokens, [1, t] for a pack; on the CPU.

    Raises:
        ValueError: positions that are not those of this rank's shard.
    """
    if packed_seq_params is not None and packed_seq_params.cp_group is not None:
        cp_group = packed_seq_params.cp_group
    if cp_group is None or cp_group.size() == 1:
        return
    if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
        padded = packed_seq_params.cu_seqlens_q_padded
        boundaries = packed_seq_params.cu_seqlens_q if padded is None else padded
    else:
        batch, length = position_ids.shape[0], position_ids.shape[1] * cp_group.size()
        boundaries = torch.arange(0, (batch + 1) * length, length)
    check_positions(position_ids.flatten(), boundaries, cp_group.size(), cp_group.rank())


def _decide(kind: str, wanted: str, sizes: RankSizes, cp_groups: ContextGroups, backend: str) -> str:
    """The exchange that `auto`, or `dispatch` in a full layer, stands for in a call."""
    size = cp_groups.whole.size()
    # Without groups for two levels the first one has a single rank, so that a2a+p2p is not chosen.
    levels = (1, size) if cp_groups.inner is None else (cp_groups.inner.size(), cp_groups.outer.size())
    name = exchange_of_kind(kind, wanted, sizes, size, levels, backend).name
    _say_once(kind, wanted, size, name)
    return name


@functools.cache
def _say_once(kind: str, wanted: str, context_size: int, name: str) -> None:
    if name != wanted:
        logger.info("exchange = %s of %s layers over %d ranks: %s", wanted, kind, context_size, name)


def _by_kind(exchange: str | Mapping[str, str]) -> dict[str, str]:
    kinds = {"moba": exchange, "full": exchange} if isinstance(exchange, str) else dict(exchange)
    names = ("auto", *EXCHANGES)
    if set(kinds) != {"moba", "full"} or not set(kinds.values()) <= set(names):
        raise ValueError(f"exchange = {exchange!r}: give one of {', '.join(names)}, or one each for moba and full")
    return kinds


def _layer_groups(config: TransformerConfig, pg_collection: ProcessGroupCollection | None) -> ContextGroups:
    if pg_collection is None:
        pg_collection = ProcessGroupCollection.use_mpu_process_groups(["cp", "hcp"])
    whole = getattr(pg_collection, "cp", None)
    if whole is None or whole.size() != config.context_parallel_size:
        raise ValueError(
            f"context_parallel_size = {config.context_parallel_size}, but the context-parallel group has "
            f"{whole.size() if whole else 'no'} ranks: start the process groups with the size of the configuration"
        )
    inner, outer = getattr(pg_collection, "hcp", None) or (None, None)
    return ContextGroups(whole, inner, outer)
