"""The collectives of context parallelism over one process group, each asynchronous, and a count of what they bring.

Every call returns a `Pending` whose `wait` gives the result; buffers that are still being sent live as long as it does.
Bytes are counted where they arrive, by purpose, for whoever has opened `observe`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Observation:
    """What this rank received from other ranks while it was observed.

    Attributes:
        received: bytes by purpose: `summaries`, `heads`, `keys`, `gradients`, `queries`, `outputs`, `plan`.
        loads: one record for each forward pass under `dispatch`, see `dispatch.Load`.
        host_waits: how often the host waited for the device.
    """

    received: Counter[str] = field(default_factory=Counter)
    loads: list[Any] = field(default_factory=list)
    host_waits: int = 0

    @property
    def total(self) -> int:
        return self.received.total()


_observers: list[Observation] = []

# The second is the first one's name before PyTorch 2.13.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@contextlib.contextmanager
def observe() -> Iterator[Observation]:
    """Record what the exchanges of this process do inside the `with` block."""
    observation = Observation()
    _observers.append(observation)
    try:
        yield observation
    finally:
        # By identity: two observations with equal counts are equal.
        _observers[:] = [other for other in _observers if other is not observation]


def report_load(load: Any) -> None:
    """Hand a record of the load to all observers."""
    for observer in _observers:
        observer.loads.append(load)


@dataclass
class Pending:
    """A collective under way."""

    works: list[dist.Work]
    result: Any
    finish: Callable[[], Any] | None = None
    kept: Any = None

    def wait(self) -> Any:
        """Wait for the result; its buffers are then free to use."""
        for work in self.works:
            work.wait()
        self.kept = None
        return self.result if self.finish is None else self.finish()


class Wire:
    """One process group, by the ranks within it.

    Args:
        group: the group; it need not be made of neighbours.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.size = group.size()
        self.rank = group.rank()

    def shift(self, tensors: list[Tensor], purpose: str) -> Pending:
        """Send tensors to the next rank of the ring and receive as many, of the same shapes, from the one before."""
        tensors = [tensor.contiguous() for tensor in tensors]
        received = [torch.empty_like(tensor) for tensor in tensors]
        following, previous = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        sends = [dist.P2POp(dist.isend, x, group=self.group, group_peer=following) for x in tensors]
        receives = [dist.P2POp(dist.irecv, x, group=self.group, group_peer=previous) for x in received]
        works = dist.batch_isend_irecv(sends + receives)
        self._count(purpose, sum(x.nbytes for x in received))
        return Pending(works, received, kept=tensors)

    def all_gather(self, tensor: Tensor, purpose: str) -> Pending:
        """[C, ...]: the tensors of all ranks, which have one shape."""
        tensor = tensor.contiguous()
        gathered = tensor.new_empty(self.size, *tensor.shape)
        work = _all_gather(gathered.flatten(0, 1), tensor, group=self.group, async_op=True)
        self._count(purpose, gathered.nbytes - tensor.nbytes)
        return Pending([work], gathered, kept=tensor)

    def all_to_all(
        self, tensor: Tensor, purpose: str, send: list[int] | None = None, receive: list[int] | None = None
    ) -> Pending:
        """Send spans of rows to all ranks and receive theirs, in order of ranks.

        Args:
            tensor: [rows, ...].
            send, receive: rows for and from each rank; None: equal parts.
        """
        tensor = tensor.contiguous()
        send = send or [tensor.shape[0] // self.size] * self.size
        receive = receive or send
        received = tensor.new_empty(sum(receive), *tensor.shape[1:])
        work = dist.all_to_all_single(received, tensor, receive, send, group=self.group, async_op=True)
        row_bytes = tensor[:1].nbytes if tensor.shape[0] else received[:1].nbytes
        self._count(purpose, (sum(receive) - receive[self.rank]) * row_bytes)
        return Pending([work], received, kept=tensor)

    def all_reduce(self, tensor: Tensor, purpose: str) -> Pending:
        """Sum over all ranks, in place (counted as a reduce-scatter and an all-gather)."""
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        self._count(purpose, 2 * tensor.nbytes * (self.size - 1) // self.size)
        return Pending([work], tensor)

    def read(self, tensor: Tensor) -> Tensor:
        """Copy to the host, which waits for the device: the only way in which an exchange learns values."""
        for observer in _observers:
            observer.host_waits += 1
        return tensor.cpu()

    def _count(self, purpose: str, received: int) -> None:
        for observer in _observers:
            observer.received[purpose] += received
