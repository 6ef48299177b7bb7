"""The index of blocks (`attention.router: index`) in checkpoints and Hugging Face folders: which weights there are.

Both sides hold the same tensors under names that differ by the layer's prefix: `self_attention.block_router.` here,
`self_attn.block_router.` there. Rows are those of the heads, one after the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moba_megatron.config import AttentionConfig, ConfigError, ModelConfig
from moba_megatron.hf.settings import MoBASettings
from moba_megatron.model.schedule import AttentionSchedule, LayerAttention

_PARTS = ("query", "key", "query_norm", "key_norm")
INDEX_TENSORS = {
    f"self_attention.block_router.{part}.weight": f"self_attn.block_router.{part}.weight" for part in _PARTS
}
"""Names within a layer, ours and those of Hugging Face folders."""


@dataclass(frozen=True)
class Indexes:
    """The indexes of a model.

    Attributes:
        dim: channels of a head.
        heads, keys, norm: as `attention.router_heads`, `router_keys` and `router_norm`.
        layers: those that have one, from 0.
    """

    dim: int
    heads: str
    keys: str
    norm: str
    layers: frozenset[int]

    @classmethod
    def of_config(cls, attention: AttentionConfig, schedule: AttentionSchedule) -> Indexes | None:
        """Those of a training: in layers that are MoBA in some stage. None without."""
        if attention.router == "own" or attention.router_dim is None:
            return None
        layers = frozenset(n for n in range(schedule.num_layers) if not schedule.always_full(n + 1))
        return cls(attention.router_dim, attention.router_heads, attention.router_keys, attention.router_norm, layers)

    @classmethod
    def of_folder(cls, folder: Path) -> Indexes | None:
        """Those that the config.json of a Hugging Face folder tells of.

        Raises:
            ConfigError: a `moba_config` that cannot be read.
        """
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not values.get("moba_config"):
            return None
        try:
            settings = MoBASettings.from_entry(values["moba_config"], values["num_hidden_layers"])
        except ValueError as error:
            raise ConfigError([f"{folder}/config.json: {error}"]) from error
        if settings.index is None:
            return None
        layers = frozenset(n for n, kind in enumerate(settings.layer_types) if kind == "moba")
        return cls(*(settings.index[f"router_{key}"] for key in ("dim", "heads", "keys", "norm")), layers)

    def of_layers(self, layers: tuple[LayerAttention, ...]) -> Indexes | None:
        """Those that choose where layers attend like this: full layers use none."""
        used = frozenset(n for n in self.layers if layers[n].kind == "moba")
        return replace(self, layers=used) if used else None

    @property
    def settings(self) -> dict[str, Any]:
        """The entries of `moba_config`, and of an `attention` section."""
        return {
            "router_dim": self.dim,
            "router_heads": self.heads,
            "router_keys": self.keys,
            "router_norm": self.norm,
        }

    def shapes(self, model: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """The weights of the index of a layer by our name in it; none where it has no index."""
        if layer not in self.layers:
            return {}
        query = (model.num_attention_heads if self.heads == "query" else model.query_groups) * self.dim
        key = (1 if self.keys == "shared" else model.query_groups) * self.dim
        sizes: dict[str, tuple[int, ...]] = {"query": (query, model.hidden_size), "key": (key, model.hidden_size)}
        if self.norm == "rms":
            sizes |= {"query_norm": (self.dim,), "key_norm": (self.dim,)}
        return {f"self_attention.block_router.{part}.weight": shape for part, shape in sizes.items()}

    def differences(self, other: Indexes) -> list[str]:
        """How another model's indexes differ, by the keys of `attention`."""
        found = [
            f"attention.{key} = {ours}, not {other.settings[key]}"
            for key, ours in self.settings.items()
            if ours != other.settings[key]
        ]
        if self.layers != other.layers:
            mine, theirs = (", ".join(str(n + 1) for n in sorted(one.layers)) for one in (self, other))
            found.append(f"MoBA layers {mine}, not {theirs}: make these MoBA in some stage, and no others")
        return found
