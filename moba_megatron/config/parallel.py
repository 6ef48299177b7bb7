"""The section `parallel`: the numbers of ranks for model, sequence and optimizer, and their exchanges."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from moba_megatron.config.section import MOST_LAYERS, MOST_RANKS, Section

Exchange = Literal["auto", "p2p", "all_gather", "a2a", "a2a+p2p", "dispatch"]


class ExchangeConfig(Section):
    """How context-parallel ranks bring queries, keys and values together. A single word sets both keys.
    `p2p`: keys and values travel around a ring. `all_gather`: they are gathered, one key head at a time. `a2a`: each
    rank gets all tokens of some heads, so the number of ranks must divide the key heads of a tensor-parallel rank.
    `a2a+p2p`: a2a within groups of neighbours, a ring between them (`parallel.hierarchical_context`). `dispatch`:
    queries travel to the ranks that own their selected blocks. `auto`: `a2a` where the heads allow it, otherwise the
    exchange with the fewest bytes; decided once, at the start, and written into the run's config.yaml.
    """

    moba: Exchange = "auto"
    """In MoBA layers."""
    full: Exchange = "auto"
    """In full layers. They have no selected blocks, so `dispatch` means `a2a` where the heads allow it, else `p2p`."""


def _one_word_for_both(value: Any) -> Any:
    return {"moba": value, "full": value} if isinstance(value, str) else value


ExchangeSetting = Annotated[ExchangeConfig, BeforeValidator(_one_word_for_both)]


class ParallelConfig(Section):
    tensor: int = Field(default=1, ge=1, le=MOST_RANKS)
    """Tensor-parallel size: heads and feed-forward columns over this many ranks."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals split along the sequence over the tensor-parallel ranks."""
    pipeline: int = Field(default=1, ge=1, le=MOST_LAYERS)
    """Pipeline stages."""
    pipeline_layers: list[Annotated[int, Field(ge=0, le=MOST_LAYERS)]] | None = None
    """Layers of each pipeline stage, summing to `model.num_layers`; the first stage also has the embedding, the last
    one the loss. With `virtual_pipeline` one entry per chunk in the order of the model: chunk 0 of stage 0, chunk 0 of
    stage 1, and so on. Give the last stage fewer layers if `attention.last_n_full` puts expensive layers on it.
    Default: equal numbers."""
    virtual_pipeline: int | None = Field(default=None, ge=2, le=MOST_LAYERS)
    """Model chunks per pipeline rank (interleaved schedule). Default: one, not interleaved."""
    context: int = Field(default=1, ge=1, le=MOST_RANKS)
    """Context-parallel size: one sequence over this many ranks. Each document is cut into twice as many chunks, and a
    rank holds one early and one late chunk of it (zigzag), so that all ranks have equal work. Documents of a pack are
    padded to fit; if a sample is one sequence, `data.sequence_length` must be a multiple of 2 x context."""
    exchange: ExchangeSetting = ExchangeConfig()
    """How context-parallel ranks exchange keys, values or queries: one word for all layers, or one for each kind
    (`{moba: dispatch, full: a2a}`). See `parallel.exchange` below."""
    hierarchical_context: (
        Annotated[list[Annotated[int, Field(ge=2, le=MOST_RANKS)]], Field(min_length=2, max_length=2)] | None
    ) = None
    """Only for `a2a+p2p`: number of ranks on the a2a level (neighbours in one node) and on the p2p level between them;
    their product is `context`. Default: the largest a2a level that the heads allow."""
    expert: int = Field(default=1, ge=1, le=MOST_RANKS)
    """Expert-parallel size: the experts of each layer over this many of the ranks that share a pipeline stage (tensor x
    context x data-parallel). Needs `model.num_moe_experts`."""
    expert_tensor: int = Field(default=1, ge=1, le=MOST_RANKS)
    """Tensor-parallel size within an expert, whatever `tensor` is. megatron-core's default is `tensor`; small experts
    are faster undivided."""
    expert_dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens reach the ranks of their experts. `alltoall`: each token goes to the ranks of its experts.
    `allgather`: all tokens go to all ranks of `expert`, for few ranks and many chosen experts. `flex`: DeepEP's
    kernels, on GPUs that have it."""
    distributed_optimizer: bool = False
    """Split optimizer state over the data-parallel and context-parallel ranks. A run cannot change this later."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over these ranks during the backward pass of the last microbatch."""

    @property
    def model_ranks(self) -> int:
        """Processes that hold one copy of the dense layers and one microbatch."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_ranks(self) -> int:
        """Processes that hold one copy of all experts."""
        return self.expert * self.expert_tensor * self.pipeline

    @property
    def fewest_ranks(self) -> int:
        """The fewest processes that can train."""
        return math.lcm(self.model_ranks, self.expert_ranks)
