"""Bytes that a rank receives for the experts of one layer and microbatch, and how long it waits for them.

Legend of `expert_shape`: t tokens of a rank, K of E experts for each, r rows that a rank sends, n expert-parallel ranks
(m with those that share an expert), h hidden, e bytes an element, p of a router's score. Forward; the backward pass
moves as much, but for what is named.

| dispatcher | what | bytes |
|---|---|---|
| `alltoall` | rows with their weights there, and rows back | r (2 h e + p) (n - 1)/n |
| | within an expert | r (2 h e + p) (m/n - 1) |
| | numbers of rows, forward alone, where they are not fixed | 8 E (m - 1) |
| `allgather` | all tokens with scores, choices (forward alone), sums back | t (h (e + p) + E p + E) (m - 1) |
| `flex` | a token once to each rank that has an expert of it, and back | 2 t c h e |
| | its weights; with its choices, forward | 4 t c K; 12 t c K |

c is the number of other ranks that a token reaches (`expert_shape.reached_share`). All but `flex` bring a byte straight
from where it was made, so that those from other nodes are counted by their ranks. `flex` takes a token to another node
once, to the rank of the same number, and from there to others of that node.

Full recomputation repeats the forward part. Nothing runs beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from moba_megatron.config import Config
from moba_megatron.planning.expert_shape import ExpertShape, reached_share
from moba_megatron.planning.plan_machines import Cluster


@dataclass(frozen=True)
class ExpertTraffic:
    """Bytes that a rank receives from ranks of its node and of others, and the seconds that it waits for them."""

    near: float = 0.0
    far: float = 0.0
    seconds: float = 0.0

    @property
    def bytes(self) -> float:
        return self.near + self.far

    def __add__(self, other: ExpertTraffic) -> ExpertTraffic:
        return ExpertTraffic(self.near + other.near, self.far + other.far, self.seconds + other.seconds)

    def times(self, count: float) -> ExpertTraffic:
        """So much of it."""
        return ExpertTraffic(self.near * count, self.far * count, self.seconds * count)


def expert_traffic(config: Config, cluster: Cluster) -> ExpertTraffic:
    """Of one layer with experts and one microbatch, forward and backward."""
    shape = ExpertShape.of(config)
    if shape is None or shape.group == 1:
        return ExpertTraffic()
    forward, backward = _PASSES[shape.dispatcher](config, cluster, shape)
    return forward.times(2 if config.training.repeats("moe") else 1) + backward


def _alltoall(config: Config, cluster: Cluster, shape: ExpertShape) -> tuple[ExpertTraffic, ExpertTraffic]:
    row = 2 * shape.row_bytes + shape.score_bytes
    others = shape.sent * row * (shape.ranks - 1) / shape.ranks
    seconds = cluster.scatter_seconds(others, shape.splits, shape.ranks)
    between = ExpertTraffic(*cluster.near_and_far(others, shape.splits, shape.ranks), seconds)
    parts = shape.sent * row * (shape.splits - 1)
    within = ExpertTraffic(*cluster.near_and_far(parts, 1, shape.splits), parts / cluster.link(1, shape.splits))
    numbers = 0 if config.model.moe_pad_expert_input_to_capacity else 8 * shape.experts * (shape.group - 1)
    counts = ExpertTraffic(*cluster.near_and_far(numbers, 1, shape.group))
    return between + within + counts, between + within


def _allgather(config: Config, cluster: Cluster, shape: ExpertShape) -> tuple[ExpertTraffic, ExpertTraffic]:
    token = shape.row_bytes + shape.hidden * shape.score_bytes + shape.experts * shape.score_bytes
    others = shape.tokens * (shape.group - 1)

    def gathered(bytes_: float) -> ExpertTraffic:
        return ExpertTraffic(*cluster.near_and_far(bytes_, 1, shape.group),
                             cluster.reduce_seconds(bytes_, 1, shape.group))  # fmt: skip

    return gathered(others * (token + shape.experts)), gathered(others * token)


def _flex(config: Config, cluster: Cluster, shape: ExpertShape) -> tuple[ExpertTraffic, ExpertTraffic]:
    """All ranks of one copy of the experts are one group, in which each part of an expert gets its rows."""
    near = max(1, min(shape.group, cluster.per_node))
    nodes = -(-shape.group // near)
    rank = reached_share(config, shape.ranks)
    # Straight within a node; to each other node that a token reaches once, and on from there to all ranks but that one.
    straight = (near - 1) * rank
    across = (nodes - 1) * reached_share(config, min(nodes, shape.ranks))
    on = (shape.group - near) * rank * (near - 1) / near

    def moved(bytes_: int) -> ExpertTraffic:
        inside, outside = (shape.tokens * bytes_ * copies for copies in (straight + on, across))
        return ExpertTraffic(inside, outside, cluster.seconds_of(inside, outside))

    return moved(2 * shape.row_bytes + 12 * shape.top_k), moved(2 * shape.row_bytes + 4 * shape.top_k)


_PASSES = {"alltoall": _alltoall, "allgather": _allgather, "flex": _flex}


def sorted_bytes(config: Config) -> float:
    """Bytes that the memory of a GPU moves to bring rows into the order of the experts and back, for one layer and
    microbatch. Each copy of a row is read and written, there and back, and as often in the backward pass. `alltoall`
    orders rows before it sends them, and again where a rank has several experts; the others once, when they are there.
    """
    shape = ExpertShape.of(config)
    if shape is None:
        return 0.0
    copies = shape.rows
    if shape.dispatcher == "alltoall":
        copies = shape.sent + shape.rows * (shape.local > 1)
    passes = 3 if config.training.repeats("moe") else 2
    return 4.0 * copies * shape.row_bytes * passes
