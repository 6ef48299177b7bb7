"""Ways to need less memory without changing results: what each keeps, and what it costs in time.

Recomputation repeats work in the backward pass: of the feed-forward, of attention, of whole layers. The feed-forward is
cheap to repeat where sequences are long, attention is not. The feed-forward in chunks costs what its recomputation does
and needs less at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moba_megatron.config import Config
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.planning.memory import estimate_memory, fullest

# What attention keeps, all of it.
OFFLOADED = ("qkv_linear", "core_attn", "attn_proj")
# Tokens of a rank: products are large by then, and one chunk is small beside what a layer keeps.
CHUNK = 8192


@dataclass(frozen=True)
class Saving:
    """The recomputed parts, as the configuration writes them."""

    recompute: Any = "none"
    recompute_layers: int | None = None
    mlp_chunk_size: int | None = None
    offload: tuple[str, ...] = ()

    @classmethod
    def in_use(cls, config: Config) -> Saving:
        """That of a configuration."""
        training = config.training
        return cls(training.recompute, training.recompute_layers, training.mlp_chunk_size, tuple(training.offload))

    @property
    def settings(self) -> dict[str, Any]:
        """Of `training`."""
        return {
            "recompute": self.recompute,
            "recompute_layers": self.recompute_layers,
            "mlp_chunk_size": self.mlp_chunk_size,
            "offload": list(self.offload),
        }

    @property
    def words(self) -> str:
        """For a table.

        >>> Saving("full", recompute_layers=3, mlp_chunk_size=8192).words
        'full in 3 layers, mlp by 8192'
        >>> Saving(["mlp"], offload=("core_attn",)).words
        'mlp; offload core_attn'
        >>> Saving(offload=OFFLOADED).words
        'none; offload attention'
        """
        parts = self.recompute if isinstance(self.recompute, str) else " ".join(self.recompute)
        layers = f" in {self.recompute_layers} layers" if self.recompute_layers else ""
        chunks = f"mlp by {self.mlp_chunk_size}" if self.mlp_chunk_size else ""
        found = [] if parts == "none" and chunks else [parts + layers]
        words = ", ".join([*found, chunks] if chunks else found)
        parts = "attention" if self.offload == OFFLOADED else " ".join(self.offload)
        return f"{words}; offload {parts}" if self.offload else words

    def of(self, config: Config) -> Config:
        """A configuration with this saving in place of its own."""
        return config.model_copy(update={"training": config.training.model_copy(update=self.settings)})


def savings(config: Config) -> list[Saving]:
    """What this model can do without, `full` for some layers aside; nothing first, everything last."""
    model, experts, feed_forward = config.model, any(config.model.expert_layers), _feed_forward(config)
    found = [Saving(), Saving("selective")]
    if model.moe_shared_expert_intermediate_size is not None:
        found.append(Saving(["shared_experts"]))
    found += [Saving(feed_forward), Saving(["core_attn", *feed_forward])]
    if not experts:
        found += [Saving(mlp_chunk_size=CHUNK), Saving("selective", mlp_chunk_size=CHUNK)]
    found.append(Saving("full"))
    if not experts:
        found.append(Saving("full", mlp_chunk_size=CHUNK))
    return found


def with_offloading(config: Config) -> list[Saving]:
    """Those that keep attention's activations in the memory of the host, which no layout is searched with: no GPU has
    confirmed them yet."""
    return [Saving(offload=OFFLOADED), Saving(_feed_forward(config), offload=OFFLOADED)]


def _feed_forward(config: Config) -> list[str]:
    """The parts that recompute the feed-forward of every layer."""
    has_experts = config.model.expert_layers
    return ["mlp"] * (not all(has_experts)) + ["moe"] * any(has_experts)


def fitting(
    config: Config, schedule: AttentionSchedule, vocab_size: int, data_parallel: int, room: float
) -> Iterator[tuple[Saving, int]]:
    """The savings that fit into `room` bytes, with the bytes that they take; nothing else where nothing is needed.

    Of `full` also the fewest layers that fit.
    """

    def bytes_of(saving: Saving) -> int:
        return fullest(estimate_memory(saving.of(config), schedule, vocab_size, data_parallel)).total

    for saving in savings(config):
        needed = bytes_of(saving)
        if needed > room:
            continue
        yield saving, needed
        if saving == Saving():
            return
        if saving.recompute == "full":
            some = _fewest_layers(config, saving, room, bytes_of)
            if some is not None:
                yield some, bytes_of(some)


def _fewest_layers(config: Config, saving: Saving, room: float, bytes_of: Any) -> Saving | None:
    """Full recomputation of fewer layers than all; None where all are needed."""
    least, most = 1, max(config.chunk_layers)
    while least < most:
        middle = (least + most) // 2
        if bytes_of(_of_layers(saving, middle)) <= room:
            most = middle
        else:
            least = middle + 1
    return _of_layers(saving, least) if least < max(config.chunk_layers) else None


def _of_layers(saving: Saving, layers: int) -> Saving:
    return Saving(saving.recompute, layers, saving.mlp_chunk_size)
