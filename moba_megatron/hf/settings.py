"""The settings of MoBA in a transformers configuration: the entry `moba_config`.

It is a plain dictionary, so that `save_pretrained` writes it into config.json and `from_pretrained` brings it back:

    "moba_config": {"block_size": 512, "top_k": 3, "layer_types": ["moba", "moba", "full"], "decode": "full",
                    "version": 1}

`layer_types` may be left out (all layers are `moba`), and `decode` (`full`, as in the MoBA report). Layers of other
sizes are named in `layer_sizes`, by their number from 0: `{"1": {"block_size": 128, "top_k": 8}}`. The entry lies below
the top level because transformers refuses names of its own `layer_types` that it does not know.

If blocks are not chosen by top-k of their means, the entry has `selector`, `summary`, `threshold` and `share_selection`
as `ops.selection` writes them, as far as they are needed. Layers that choose in another way have an entry in
`layer_selections`: `{"1": {"selector": "recent"}}`. `budgets` has the K of each key head where they
differ, beside a `top_k` that is the largest: `{"1": {"selector": "top_k", "budgets": [2, 5]}}`. A model whose keys are
convolved has `key_convolution`, the filters' width. Such entries have version 2, so older readers refuse them instead
of using another attention.

`router: index` says that blocks are chosen by an index with weights of its own (`block_router`), whose shape
`router_dim`, `router_heads` (`key` or `query`), `router_keys` (`shared` or `key`) and `router_norm` (`rms` or `none`)
give, written as `attention.router_*` of a training configuration. Such entries have version 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moba_megatron.ops.layout import check_settings
from moba_megatron.ops.router import check_router_selection
from moba_megatron.ops.selection import MOBA, Selection

NAME = "moba"
"""Of the attention and the mask in transformers' registries."""
VERSION = 1
VERSION_OF_SELECTIONS = 2
VERSION_OF_INDEXES = 3
LAYER_TYPES = ("moba", "full")
DECODE_MODES = ("full", "moba")
EXAMPLE = '{"1": {"block_size": 128, "top_k": 8}}'
EXAMPLE_OF_SELECTIONS = '{"1": {"selector": "sink_recent"}}'
HOW_TO_SET = "call moba_megatron.hf.configure(model, block_size=..., top_k=...)"
_SELECTION = ("selector", "summary", "threshold", "share_selection", "budgets")
_SIZES = {"block_size", "top_k", "layer_types", "decode", "layer_sizes"}
_CHOICES = {*_SIZES, "layer_selections", "key_convolution", *_SELECTION}
_INDEX = {
    "router_dim": None,
    "router_heads": ("key", "query"),
    "router_keys": ("shared", "key"),
    "router_norm": ("rms", "none"),
}
_KEYS = {
    VERSION: _SIZES,
    VERSION_OF_SELECTIONS: _CHOICES,
    VERSION_OF_INDEXES: {*_CHOICES, "router", *_INDEX},
}


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
        selection: how past blocks are chosen.
        layer_selections: that of layers that choose otherwise, by their number from 0.
        key_convolution: width of the convolution of keys in all layers, which the model's own code makes; None: none.
        index: the settings `router_dim`, `router_heads`, `router_keys` and `router_norm` of the index that chooses
            blocks in moba layers; None: queries and keys of the attention choose.
    """

    block_size: int
    top_k: int
    layer_types: tuple[str, ...]
    decode: str = "full"
    layer_sizes: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    selection: Selection = MOBA
    layer_selections: Mapping[int, Selection] = field(default_factory=dict)
    key_convolution: int | None = None
    index: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_settings(self.block_size, self.top_k)
        for name, own in (("layer_sizes", self.layer_sizes), ("layer_selections", self.layer_selections)):
            for layer in own:
                if not 0 <= layer < len(self.layer_types) or self.layer_types[layer] != "moba":
                    raise ValueError(f"{name} names layer {layer}, which is not a moba layer of {self.layer_types}")
        for sizes in self.layer_sizes.values():
            check_settings(*sizes)
        for layer, kind in enumerate(self.layer_types):
            if kind == "moba":
                size_and_blocks = self.layer_sizes.get(layer, (self.block_size, self.top_k))
                self.layer_selections.get(layer, self.selection).with_blocks(size_and_blocks[1])
        for layer, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                raise ValueError(f"layer_types[{layer}] must be one of {', '.join(LAYER_TYPES)}, got {kind!r}")
        if self.index is not None:
            self._check_index(self.index)
        if self.decode not in DECODE_MODES:
            raise ValueError(f"decode must be one of {', '.join(DECODE_MODES)}, got {self.decode!r}")

    def _check_index(self, index: Mapping[str, Any]) -> None:
        size = index.get("router_dim")
        if index.keys() != _INDEX.keys() or isinstance(size, bool) or not isinstance(size, int) or size < 2 or size % 2:
            raise ValueError(
                f"moba_config: an index has {', '.join(_INDEX)}, the first an even number of at least 2, not "
                f"{dict(index)}"
            )
        for key, words in _INDEX.items():
            if words is not None and index[key] not in words:
                raise ValueError(f"moba_config: {key} must be {' or '.join(words)}, got {index[key]!r}")
        for selection in (self.selection, *self.layer_selections.values()):
            check_router_selection(selection)

    @classmethod
    def from_config(cls, config: Any) -> MoBASettings:
        """Read `config.moba_config`.

        Raises:
            ValueError: no such entry, other keys than those above, another version, or a different number of layers
                than the model.
        """
        entry = getattr(config, "moba_config", None)
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"the configuration of this {getattr(config, 'model_type', 'model')} has no moba_config "
                f"(got {entry!r}): {HOW_TO_SET}"
            )
        settings = cls.from_entry(entry, config.num_hidden_layers)
        for selection in (settings.selection, *settings.layer_selections.values()):
            if selection.budgets is not None:
                selection.with_blocks(max(selection.budgets), key_heads(config))
        return settings

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], layers: int) -> MoBASettings:
        """Read the entry `moba_config` of a model with this number of layers. Raises as `from_config`."""
        values = dict(entry)
        version = values.pop("version", VERSION)
        if version not in _KEYS:
            raise ValueError(
                f"moba_config has version {version!r}, this package reads {' and '.join(map(str, _KEYS))}: use the "
                "package's release"
            )
        missing = {"block_size", "top_k"} - values.keys()
        unknown = values.keys() - _KEYS[version]
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
            raise ValueError(
                f"moba_config: layer_sizes must be like {EXAMPLE}, not {entry['layer_sizes']!r}"
            ) from error
        index = {key: values.pop(key) for key in _INDEX if key in values}
        router = values.pop("router", "own")
        if router not in ("own", "index") or (router == "index") != bool(index):
            raise ValueError(
                f"moba_config: router must be own, or index with {', '.join(_INDEX)}; it is {router!r} with "
                f"{sorted(index)}"
            )
        selection = _selection({key: values.pop(key) for key in _SELECTION if key in values})
        others = values.pop("layer_selections", {})
        try:
            selections = {int(layer): _selection(chosen) for layer, chosen in others.items()}
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"moba_config: layer_selections must be like {EXAMPLE_OF_SELECTIONS}, got {others!r}"
            ) from error
        values |= {"selection": selection, "layer_selections": selections, "index": index or None}
        return cls(layer_types=kinds, layer_sizes=own, **values)

    def of_layer(self, layer: int) -> MoBASettings:
        """The same with the block size, top-k and selection of a layer, counted from 0."""
        block_size, top_k = self.layer_sizes.get(layer, (self.block_size, self.top_k))
        selection = self.layer_selections.get(layer, self.selection)
        if self.layer_types[layer] != "moba":
            selection = selection.with_one_budget  # of other layers' sizes
        own = {"block_size": block_size, "top_k": top_k, "selection": selection}
        return replace(self, layer_sizes={}, layer_selections={}, **own)

    @property
    def covered(self) -> int | None:
        """Tokens up to which all layers attend to everything; None if no layer attends by MoBA."""
        sparse = [self.of_layer(layer) for layer, kind in enumerate(self.layer_types) if kind == "moba"]
        # Of two past blocks a threshold may leave one out; of one it never does.
        blocks = [own.selection.fewest_blocks(own.top_k) for own in sparse]
        blocks = [count if own.selection.fills_up else min(count, 2) for own, count in zip(sparse, blocks, strict=True)]
        return min((own.block_size * count for own, count in zip(sparse, blocks, strict=True)), default=None)

    def to_config(self) -> dict[str, Any]:
        """The entry `moba_config`."""
        sizes = {
            str(layer): {"block_size": block_size, "top_k": top_k}
            for layer, (block_size, top_k) in self.layer_sizes.items()
        }
        entry = {
            "block_size": self.block_size,
            "top_k": self.top_k,
            "layer_types": list(self.layer_types),
            "decode": self.decode,
            "version": VERSION,
            **({"layer_sizes": sizes} if sizes else {}),
        }
        plain = self.selection.is_plain and not self.layer_selections and self.key_convolution is None
        index = {} if self.index is None else {"router": "index", **self.index, "version": VERSION_OF_INDEXES}
        if plain:
            return {**entry, **index}
        others = {str(layer): _words(selection) for layer, selection in self.layer_selections.items()}
        entry |= {**_words(self.selection), **({"layer_selections": others} if others else {})}
        convolution = {} if self.key_convolution is None else {"key_convolution": self.key_convolution}
        return {**entry, **convolution, "version": VERSION_OF_SELECTIONS, **index}


def _selection(words: Mapping[str, Any]) -> Selection:
    """Raises ValueError for words that `ops.selection` does not know, or that contradict each other."""
    unknown = words.keys() - set(_SELECTION)
    if unknown:
        raise ValueError(f"moba_config: a selection of blocks has {', '.join(_SELECTION)}, got {sorted(unknown)}")
    return Selection(**words)


def _words(selection: Selection) -> dict[str, Any]:
    words = {key: value for key, value in selection.settings.items() if value is not None}
    if selection.budgets is not None:
        words["budgets"] = list(selection.budgets)
    return words if selection.shared else {key: words[key] for key in words if key != "share_selection"}


def key_heads(config: Any) -> int:
    """Key heads of a layer of transformers' configuration."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


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
