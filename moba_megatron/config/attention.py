"""The settings of `attention`: kinds of layers, the choice of blocks, stages of the training, single layers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from moba_megatron.config.section import LONGEST, MOST_LAYERS, Section

AttentionKind = Literal["moba", "full"]
AttentionSelector = Literal["top_k", "recent", "sink_recent", "threshold"]
AttentionSummary = Literal["mean", "min_max"]
BlocksOfQuery = Annotated[int, Field(ge=1, le=LONGEST)]
# JSON and the command line have only strings as keys.
LayerNumber = Annotated[int, Field(strict=False)]


class LayerAttentionOverride(Section):
    kind: AttentionKind | None = None
    """`moba` or `full` for this layer."""
    block_size: int | None = Field(default=None, ge=1, le=LONGEST)
    """Tokens per block in this layer."""
    top_k: BlocksOfQuery | list[BlocksOfQuery] | None = None
    """Blocks per query in this layer, the current one counted; or a list with one number for each key head, as
    `evaluate --routing --suggest-budget` prints it."""
    selector: AttentionSelector | None = None
    """As `attention.selector`, for this layer."""
    summary: AttentionSummary | None = None
    """As `attention.summary`, for this layer."""
    threshold: float | None = Field(default=None, gt=0, le=1)
    """As `attention.threshold`, for this layer."""

    @field_validator("top_k", mode="before")
    @classmethod
    def _number_or_numbers(cls, value: Any) -> Any:
        """One error, where a union of types would make two."""
        numbers = value if isinstance(value, list) else [value]
        wrong = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= LONGEST]
        if value is not None and wrong:
            raise ValueError(f"a number of blocks from 1 to {LONGEST}, or a list with one for each key head")
        return value

    @property
    def of_moba(self) -> list[str]:
        """Names of the settings that are given and have an effect in a MoBA layer alone."""
        return [name for name in type(self).model_fields if name != "kind" and getattr(self, name)]


class AttentionStage(Section):
    """One stage of the training. Settings that it leaves out are as in `attention`."""

    until: float = Field(gt=0, le=1)
    """Share of the training tokens at which this stage ends; the last stage ends at 1."""
    kind: AttentionKind | None = None
    """As `attention.kind`."""
    block_size: int | None = Field(default=None, ge=1, le=LONGEST)
    """As `attention.block_size`."""
    top_k: int | None = Field(default=None, ge=1, le=LONGEST)
    """As `attention.top_k`."""
    selector: AttentionSelector | None = None
    """As `attention.selector`."""
    last_n_full: int | None = Field(default=None, ge=0, le=MOST_LAYERS)
    """As `attention.last_n_full`."""
    full_every_n: int | None = Field(default=None, ge=1, le=MOST_LAYERS)
    """As `attention.full_every_n`."""
    full_layers: list[int] | None = None
    """As `attention.full_layers`."""
    layers: dict[LayerNumber, LayerAttentionOverride] | None = None
    """As `attention.layers`."""


class AttentionConfig(Section):
    """Which layers attend how, and when (MoBA report, sections 2.2 and 3.2)."""

    kind: AttentionKind = "moba"
    """`moba`: block-sparse attention. `full`: causal attention to all tokens."""
    block_size: int = Field(default=512, ge=1, le=LONGEST)
    """Tokens per block (B). 512 is the report's choice at 8K."""
    top_k: int = Field(default=3, ge=1, le=LONGEST)
    """Blocks per query (K), the current block counted. 3 is the report's choice at 8K."""
    selector: AttentionSelector = "top_k"
    """How a query of a MoBA layer chooses its K - 1 past blocks. `top_k`: those with the best scores, as in MoBA (with
    `top_k: 2` LongHeads). `recent`: the nearest, a sliding window of blocks. `sink_recent`: the document's first block
    and the K - 2 nearest. `threshold`: those with the best scores until `threshold` is reached, at most K - 1
    (VMoBA)."""
    summary: AttentionSummary = "mean"
    """How blocks are scored: by the `mean` of their keys, or by `min_max`, the largest score possible for a key within
    the block's bounds in each channel (Quest)."""
    threshold: float | None = Field(default=None, gt=0, le=1)
    """For the selector `threshold`: the share of the softmax over the scores of all past blocks (scaled by 1/sqrt(head
    size)) that the chosen blocks must reach."""
    share_selection: Literal["none", "mean", "max"] = "none"
    """Whether the query heads of a key head choose the same blocks: `none`, or by the `mean` or the `max` of their
    scores (as NSA and MSA do). Generation then reads fewer different blocks."""
    router: Literal["own", "index"] = "own"
    """What chooses the blocks of MoBA layers. `own`: the queries and keys of the attention (MoBA). `index`: projections
    of the hidden states that are learned for it, in every layer that is MoBA in some stage (docs/router.md). It has
    the selectors `top_k` and `threshold`."""
    router_dim: int | None = Field(default=None, ge=2, le=2**16)
    """Channels of a head of the index, an even number. Needed with `router: index`."""
    router_heads: Literal["key", "query"] = "key"
    """Whether the index chooses once for each `key` head, or for each `query` head."""
    router_keys: Literal["shared", "key"] = "shared"
    """Whether all heads of the index have one `shared` key, or one for each `key` head."""
    router_norm: Literal["rms", "none"] = "rms"
    """Norm of the index's queries and keys, by head."""
    router_loss: Literal["none", "sparse", "dense"] = "sparse"
    """What the index learns from. `sparse`: the attention that each chosen past block gets; it needs two, so a `top_k`
    of 3. `dense`: the full attention of every past block, as expensive as full attention; under context parallelism
    only with `parallel.exchange: a2a`. `none`: it is frozen."""
    router_loss_coeff: float = Field(default=1.0, gt=0)
    """Weight of this loss, a mean over the heads of the index, for each layer and token. Its gradient is part of the
    norm that `optimizer.clip_grad` bounds, so a large weight slows the model."""
    router_init: Literal["drawn", "copied"] = "drawn"
    """First weights of an index that `model.init_from` does not bring. `copied`: the layer's own queries and keys, so
    that it chooses as MoBA does; it needs `router_heads: query`, `router_keys: key`, the head size as `router_dim`, and
    `router_norm: rms` exactly where the model has `qk_layernorm`."""
    key_convolution: Literal[3, 5] | None = None
    """Width (tokens) of a causal convolution of the keys, with SiLU, a residual and one filter for each channel
    (FlashMoBA). It adds parameters to every layer, also to full ones. They start at zero, without effect. Default: no
    convolution."""
    last_n_full: int = Field(default=0, ge=0, le=MOST_LAYERS)
    """The last N layers attend fully (the report: 3 of 32)."""
    full_every_n: int | None = Field(default=None, ge=1, le=MOST_LAYERS)
    """Every n-th layer (n, 2n, ...) attends fully."""
    full_layers: list[int] = []
    """Layers that attend fully, counted from 1."""
    layers: dict[LayerNumber, LayerAttentionOverride] = {}
    """Settings of single layers, counted from 1. They win over everything above."""
    stages: list[AttentionStage] = []
    """Stages of the training, in order; empty: one stage. `[{until: 0.9}, {until: 1.0, kind: full}]` is the report's
    sparse first, full at the end."""
    backend: Literal["auto", "reference", "gathered", "triton", "flash_moba"] = "auto"
    """Implementation of MoBA. `auto` is decided once, at the start, and written into the run's config.yaml.
    `flash_moba` is another package, with block means in the precision of the weights; `auto` never takes it."""
    full_backend: Literal["auto", "torch", "torch_flash", "cudnn", "flash_attn", "flash_attn_3", "flash_attn_4"] = (
        "auto"
    )
    """Implementation of full attention outside Transformer Engine layers and without context parallelism. `auto`: the
    first of flash-attn 3 (Hopper), flash-attn-4 (Hopper, Blackwell) and flash-attn 2 that is installed, else `torch`,
    PyTorch's choice among its fused kernels."""
    workspace_bytes: int | None = Field(default=None, ge=1)
    """Bytes of room for what MoBA keeps of the attention of past blocks until it is combined. Work is cut into passes
    to fit; where it is cut changes the order of sums, so that it never depends on the memory that is free. Default: on
    GPUs the size of a layer's queries, at least 2 GiB (2147483648); on CPUs a multiple of one key head's queries."""

    @property
    def selectors(self) -> set[str]:
        """All selectors that some layer may have in some stage."""
        return self._named("selector")

    @property
    def overrides(self) -> dict[str, LayerAttentionOverride]:
        """The settings of single layers, by the key that holds them: `attention.layers.3`."""
        parts = [("attention", self.layers)]
        parts += [(f"attention.stages.{i}", stage.layers or {}) for i, stage in enumerate(self.stages)]
        return {f"{name}.layers.{number}": layer for name, layers in parts for number, layer in layers.items()}

    @property
    def kinds(self) -> set[str]:
        """Kinds of layers that are named for some stage."""
        return self._named("kind")

    def _named(self, key: str) -> set[str]:
        """The values of a setting here, in the stages and in single layers."""
        return {getattr(section, key) for section in (self, *self.stages, *self.overrides.values())} - {None}

    @property
    def top_k_of_means(self) -> bool:
        """Whether blocks are chosen as in the MoBA report, everywhere."""
        own = self.overrides.values()
        means = {self.summary, *(layer.summary or "mean" for layer in own)} == {"mean"}
        one_budget = not any(isinstance(layer.top_k, list) for layer in own)
        return self.selectors == {"top_k"} and means and one_budget and self.share_selection == "none"
