"""Samples over the data-parallel ranks: each scores its share, and all get the scores of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moba_megatron.evaluation.tasks.scoring import TaskModel

Item = TypeVar("Item")
Score = TypeVar("Score")


@dataclass(frozen=True)
class Share:
    """This rank's place among those that score different samples.

    Attributes:
        rank, ranks: which of how many.
        group: of these ranks; None where there is one.
        in_step: whether all of them have to pass through the model equally often, because they share its experts.
        device: of tensors that the group exchanges.
    """

    rank: int = 0
    ranks: int = 1
    group: dist.ProcessGroup | None = None
    in_step: bool = False
    device: torch.device | None = None


@dataclass
class _Counted:
    """A model and how often it was asked."""

    model: TaskModel
    passes: int = 0

    def last_logits(self, ids: list[int], last: int) -> Tensor:
        self.passes += 1
        return self.model.last_logits(ids, last)


def scored(
    items: Sequence[Item],
    model: TaskModel,
    score: Callable[[TaskModel, Item], Score],
    share: Share,
    shown: Callable[[Iterator[int]], Iterator[int]],
) -> list[Score]:
    """The score of every item, in order. Collective.

    Args:
        shown: goes around the numbers of the rounds, in each of which every rank scores one item.
    """
    own: list[Score] = []
    for first in shown(iter(range(0, len(items), share.ranks))):
        counted = _Counted(model)
        if first + share.rank < len(items):
            own.append(score(counted, items[first + share.rank]))
        if share.in_step:
            most = torch.tensor(counted.passes, device=share.device)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=share.group)
            for _ in range(int(most) - counted.passes):
                model.last_logits([0, 0], 1)
    if share.group is None or share.ranks == 1:
        return own
    everyone: list[list[Score]] = [[] for _ in range(share.ranks)]
    dist.all_gather_object(everyone, own, group=share.group)
    return [everyone[number % share.ranks][number // share.ranks] for number in range(len(items))]
