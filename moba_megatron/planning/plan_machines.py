"""GPUs by their data sheets, and the shares of their peaks that a plan assumes."""

from __future__ import annotations

from dataclasses import dataclass

from moba_megatron.planning.kernel_model import MACHINES, Machine

# Matrix products of a layer with what runs between them (norms, SwiGLU, copies), over the bf16 peak. Plain products
# reach 0.8 on an H200; the rest is an assumption.
MATRIX_SHARE = 0.6
# The same of experts: grouped products, and narrow ones. An assumption.
EXPERT_SHARE = 0.45
# Of the links' peaks: an assumption for large messages.
LINK_SHARE = 0.75
# Of a GPU's memory: the rest is for the CUDA context, NCCL's buffers and the allocator's slack.
MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of its kind.

    Attributes:
        memory: bytes.
        node_link: bytes/s that one GPU receives from others of its node.
        network_link: bytes/s that one GPU receives from other nodes (an adapter of 200 or 400 Gbit/s for each).
        host_link: bytes/s to the memory of its host, and as many from there (16 lanes of PCIe 4 or 5).
    """

    machine: Machine
    memory: float
    node_link: float
    network_link: float
    host_link: float

    @property
    def name(self) -> str:
        return self.machine.name


_MACHINES = {machine.name.lower(): machine for machine in MACHINES}
GPUS = {
    "a100": Gpu(_MACHINES["a100"], 80e9, 300e9, 25e9, 32e9),
    "h100": Gpu(_MACHINES["h100"], 80e9, 450e9, 50e9, 64e9),
    "h200": Gpu(_MACHINES["h200"], 141e9, 450e9, 50e9, 64e9),
    "b200": Gpu(_MACHINES["b200"], 180e9, 900e9, 50e9, 64e9),
}


@dataclass(frozen=True)
class Cluster:
    """A number of GPUs of one kind, with fast links between `per_node` of them.

    Ranks are placed as megatron-core does: tensor-parallel ranks are neighbours, then context-parallel, then
    data-parallel ones, then pipeline stages. Within a stage the ranks of experts are counted anew: those of one expert
    (`parallel.expert_tensor`) are neighbours, then expert-parallel ones.
    """

    gpu: Gpu
    count: int
    per_node: int = 8

    def within_node(self, stride: int, ranks: int) -> bool:
        """Whether a group of `ranks` ranks, `stride` apart, is within a node."""
        return stride * ranks <= self.per_node

    def link(self, stride: int, ranks: int) -> float:
        """Bytes/s of a hop of a ring over a group: its slowest link."""
        return LINK_SHARE * (self.gpu.node_link if self.within_node(stride, ranks) else self.gpu.network_link)

    def scatter_seconds(self, bytes_: float, stride: int, ranks: int) -> float:
        """Time of `bytes_` that come in equal parts from all other ranks of a group."""
        return self.seconds_of(*self.near_and_far(bytes_, stride, ranks))

    def near_and_far(self, bytes_: float, stride: int, ranks: int) -> tuple[float, float]:
        """How many of such bytes come from ranks of the same node, and from others."""
        if ranks == 1:
            return 0.0, 0.0
        near = max(1, min(ranks, self.per_node // stride))
        far = bytes_ * (ranks - near) / (ranks - 1)
        return bytes_ - far, far

    def seconds_of(self, near: float, far: float) -> float:
        """Time of bytes from ranks of the same node and from others, which come at once."""
        return max(near / (LINK_SHARE * self.gpu.node_link), far / (LINK_SHARE * self.gpu.network_link))

    def reduce_seconds(self, bytes_: float, stride: int, ranks: int) -> float:
        """Time of a collective over many ranks of each node: its rings share the adapters of the node."""
        rings = max(1, self.per_node // stride)
        far = min(self.gpu.node_link, rings * self.gpu.network_link)
        near = self.within_node(stride, ranks)
        return bytes_ / (LINK_SHARE * (self.gpu.node_link if near else far))
