"""What a transformers configuration says about MoBA: the entry `moba_config`.

It is a plain dictionary, so that `save_pretrained` writes it into config.json and `from_pretrained` brings it back:

    "moba_config": {"block_size": 512, "top_k": 3, "layer_types": ["moba", "moba", "full"], "decode": "full",
                    "version": 1}

`layer_types` may be left out (all layers are `moba`), and `decode` (`full`, as in the MoBA report). Layers of other
sizes are named in `layer_sizes`, by their number from 0: `{"1": {"block_size": 128, "top_k": 8}}`. The entry lies below
the top level because transformers refuses names of its own `layer_types` that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moba_megatron.ops.layout import check_settings

NAME = "moba"
"""Of the attention and the mask in transformers' registries."""
VERSION = 1
LAYER_TYPES = ("moba", "full")
DECODE_MODES = ("full", "moba")
EXAMPLE = '{"1": {"block_size": 128, "top_k": 8}}'
HOW_TO_SET = "call moba_megatron.hf.configure(model, block_size=..., top_k=...)"


@dataclass(frozen=True)
class MoBASettings:
    """How the layers of a model attend.

    Attributes:
        block_size: tokens per block.
        top_k: blocks per query, its own counted.
        layer_types: `moba` or `full` for each layer, from the first on.
        decode: how a single new token attends to a cache in `moba` layers: `full`, to all of it, as the MoBA report
            does; `moba`, to its blocks, as in one forward pass over the whole text.
        layer_sizes: (block size, top-k) of layers that have others, by their number from 0.
    """

    block_size: int
    top_k: int
    layer_types: tuple[str, ...]
    decode: str = "full"
    layer_sizes: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_settings(self.block_size, self.top_k)
        for layer, sizes in self.layer_sizes.items():
            if not 0 <= layer < len(self.layer_types) or self.layer_types[layer] != "moba":
                raise ValueError(f"layer_sizes names layer {layer}, which is no moba layer of {self.layer_types}")
            check_settings(*sizes)
        for layer, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                raise ValueError(f"layer_types[{layer}] must be one of {', '.join(LAYER_TYPES)}, got {kind!r}")
        if self.decode not in DECODE_MODES:
            raise ValueError(f"decode must be one of {', '.join(DECODE_MODES)}, got {self.decode!r}")

    @classmethod
    def from_config(cls, config: Any) -> MoBASettings:
        """Read `config.moba_config`.

        Raises:
            ValueError: there is none, it has other keys than those above, another version, or as many layers as the
                model has not.
        """
        entry = getattr(config, "moba_config", None)
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"the configuration of this {getattr(config, 'model_type', 'model')} has no moba_config "
                f"(got {entry!r}): {HOW_TO_SET}"
            )
        return cls.from_entry(entry, config.num_hidden_layers)

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], layers: int) -> MoBASettings:
        """Read the entry `moba_config` of a model of so many layers. Raises as `from_config`."""
        values = dict(entry)
        version = values.pop("version", VERSION)
        if version != VERSION:
            raise ValueError(
                f"moba_config has version {version!r}, this package reads {VERSION}: use the package's release"
            )
        missing = {"block_size", "top_k"} - values.keys()
        unknown = values.keys() - {"block_size", "top_k", "layer_types", "decode", "layer_sizes"}
        if missing or unknown:
            raise ValueError(
                f"moba_config lacks {sorted(missing)} and has unknown keys {sorted(unknown)}: {HOW_TO_SET}"
            )
        kinds = tuple(values.pop("layer_types", None) or ("moba",) * layers)
        if len(kinds) != layers:
            raise ValueError(f"moba_config names {len(kinds)} layer_types, the model has {layers} layers: {HOW_TO_SET}")
        try:
            own = {
                int(layer): (own["block_size"], own["top_k"]) for layer, own in values.pop("layer_sizes", {}).items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"moba_config: layer_sizes must be as {EXAMPLE}, got {entry['layer_sizes']!r}") from error
        return cls(layer_types=kinds, layer_sizes=own, **values)

    def of_layer(self, layer: int) -> MoBASettings:
        """The same with the block size and top-k of a layer, counted from 0."""
        block_size, top_k = self.layer_sizes.get(layer, (self.block_size, self.top_k))
        return replace(self, block_size=block_size, top_k=top_k)

    @property
    def covered(self) -> int | None:
        """Tokens up to which all layers attend to everything; None if no layer attends by MoBA."""
        sparse = [layer for layer, kind in enumerate(self.layer_types) if kind == "moba"]
        sizes = [self.layer_sizes.get(layer, (self.block_size, self.top_k)) for layer in sparse]
        return min((block_size * top_k for block_size, top_k in sizes), default=None)

    def to_config(self) -> dict[str, Any]:
        """The entry `moba_config`."""
        sizes = {
            str(layer): {"block_size": block_size, "top_k": top_k}
            for layer, (block_size, top_k) in self.layer_sizes.items()
        }
        return {
            "block_size": self.block_size,
            "top_k": self.top_k,
            "layer_types": list(self.layer_types),
            "decode": self.decode,
            "version": VERSION,
            **({"layer_sizes": sizes} if sizes else {}),
        }


def layer_types(num_layers: int, last_n_full: int = 0) -> tuple[str, ...]:
    """The layer-wise hybrid of the MoBA report: the last layers attend fully.

    >>> layer_types(4, 1)
    ('moba', 'moba', 'moba', 'full')

    Raises:
        ValueError: more full layers than layers.
    """
    if not 0 <= last_n_full <= num_layers:
        raise ValueError(f"last_n_full must be between 0 and the number of layers, {num_layers}, got {last_n_full}")
    return ("moba",) * (num_layers - last_n_full) + ("full",) * last_n_full
