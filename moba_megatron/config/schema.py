"""Every setting, with its type, its bounds, its unit and the reason for its default.

The docstring below a field is its documentation: `docs/configuration.md` is made from it. Paths are relative to the
working directory. Sizes are in tokens unless the field names another unit.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, field_validator

from moba_megatron.config.literal import literal
from moba_megatron.config.model import ModelConfig
from moba_megatron.config.parallel import ParallelConfig
from moba_megatron.config.section import LONGEST, MOST_LAYERS, MOST_STEPS, Section

AttentionKind = Literal["moba", "full"]
AttentionSelector = Literal["top_k", "recent", "sink_recent", "threshold"]
AttentionSummary = Literal["mean", "min_max"]
BlocksOfQuery = Annotated[int, Field(ge=1, le=LONGEST)]
# JSON and the command line have only strings as keys.
LayerNumber = Annotated[int, Field(strict=False)]


class RunConfig(Section):
    dir: str
    """Folder of this run: resolved config, metrics, evaluations, checkpoints, plots. Made if missing. If it already
    holds a run, that run is resumed (see `checkpoint.resume`)."""
    seed: int = Field(default=1234, ge=0, le=2**32 - 1)
    """Seed of weights, dropout and data order. The first weights are the same at every parallel layout; a CPU and a GPU
    give different ones."""
    threads: int | None = Field(default=None, ge=1, le=4096)
    """CPU threads per process. Default: the cores of this machine divided by the processes on it."""
    stall_seconds: float | None = Field(default=300.0, ge=1, le=10**6)
    """After this many seconds without a step, an evaluation or a checkpoint, report which rank is silent or slow, and
    where it waits. The run continues to wait. None: never."""


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
    def chooses(self) -> bool:
        """Whether anything but the kind is set: what has an effect in a MoBA layer alone."""
        return bool(self.block_size or self.top_k or self.selector or self.summary or self.threshold)


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
    """What the index learns from. `sparse`: the attention that each chosen past block gets. `dense`: the full
    attention of every past block, as expensive as full attention; under context parallelism only with
    `parallel.exchange: a2a`. `none`: it stays as it is."""
    router_loss_coeff: float = Field(default=1.0, gt=0)
    """Weight of this loss, a mean over the heads of the index, for each layer and token."""
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
        named = [self.selector, *(stage.selector for stage in self.stages)]
        layers = [self.layers, *(stage.layers or {} for stage in self.stages)]
        return {*named, *(layer.selector for some in layers for layer in some.values())} - {None}

    @property
    def overrides(self) -> dict[str, LayerAttentionOverride]:
        """The settings of single layers, by the key that holds them: `attention.layers.3`."""
        parts = [("attention", self.layers)]
        parts += [(f"attention.stages.{i}", stage.layers or {}) for i, stage in enumerate(self.stages)]
        return {f"{name}.layers.{number}": layer for name, layers in parts for number, layer in layers.items()}

    @property
    def kinds(self) -> set[str]:
        """Kinds of layers that are named for some stage."""
        named = [self.kind, *(stage.kind for stage in self.stages)]
        layers = [self.layers, *(stage.layers or {} for stage in self.stages)]
        return {*named, *(layer.kind for some in layers for layer in some.values())} - {None}

    @property
    def top_k_of_means(self) -> bool:
        """Whether blocks are chosen as in the MoBA report, everywhere."""
        own = self.overrides.values()
        means = {self.summary, *(layer.summary or "mean" for layer in own)} == {"mean"}
        one_budget = not any(isinstance(layer.top_k, list) for layer in own)
        return self.selectors == {"top_k"} and means and one_budget and self.share_selection == "none"


class BlendEntry(Section):
    path: str
    """Prefix of an indexed dataset (`PATH.bin`, `PATH.idx`)."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples, relative to the other entries."""


class DataConfig(Section):
    train: str | list[BlendEntry]
    """Prefix of the indexed training data (`PATH.bin` and `PATH.idx`), or a blend of several: a list, or the path of a
    blend file (.yaml)."""
    validation: str | list[BlendEntry] | None = None
    """The same for validation. None: no evaluation."""
    tokenizer: str
    """Folder of the Hugging Face tokenizer that made the data. Data made with another tokenizer is refused."""
    sequence_length: int = Field(ge=2, le=LONGEST)
    """Tokens per sample."""
    index_cache: str | None = None
    """Folder of the sample indices that rank 0 builds from the data, on a disk that all machines see; runs may share
    it. Default: `index_cache/` beside the data, or in the run folder if that place is not writable."""
    packing: Literal["concatenate", "best_fit", "document"] = "concatenate"
    """`concatenate`: documents are joined by the end-of-document token and cut into samples (GPT style). `best_fit`:
    samples are filled with whole documents as far as possible; only documents longer than a sample are cut. `document`:
    one long document a sample. With the last two, samples may end in padding, which never counts."""
    min_document_length: int | None = Field(default=None, ge=2, le=2**31 - 1)
    """With `packing: document`: shorter documents are left out (the end-of-document token counts). Documents longer
    than a sample are cut into samples, and a rest below this length is left out too. Default: a whole sample."""
    cross_document_attention: bool = False
    """False: tokens attend only within their document; blocks and positions start again at each document of a sample
    (packed sequences). True: a sample is one sequence."""


RecomputedModule = Literal["core_attn", "mlp", "moe", "shared_experts"]
OTHER_MODULES = {
    "layernorm": "needs norms that are not fused into the next product",
    "moe_act": "needs grouped experts on every device",
    "mla_up_proj": "belongs to multi-latent attention",
    "gdn_norm_out": "belongs to gated delta networks",
}
"""Parts that megatron-core can recompute but this project cannot, with the reason."""
OffloadedModule = Literal["qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"]


class TrainingConfig(Section):
    steps: int = Field(ge=1, le=MOST_STEPS)
    """Optimizer steps of the whole run: schedules and data order are for this number. A resumed run keeps it."""
    stop_after: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """End this process early, after this step, with a checkpoint; schedules still count `steps`."""
    global_batch_size: int = Field(ge=1, le=2**24)
    """Samples per optimizer step over all ranks."""
    micro_batch_size: int = Field(default=1, ge=1, le=2**24)
    """Samples per forward pass of a rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """`bf16`: weights and activations in bf16 with fp32 main weights, gradients and optimizer state."""
    recompute: Literal["none", "selective", "full"] | list[RecomputedModule] = "none"
    """Parts that the backward pass computes again: `full` layers, `selective` (the core attention), or a list:
    `core_attn`, `mlp` (dense feed-forward layers), `moe` (layers of experts; their tokens are sent again),
    `shared_experts`. `[mlp]` does not repeat the attention, the slowest part of long sequences."""
    recompute_layers: int | None = Field(default=None, ge=1)
    """With `recompute: full`: number of layers that are computed again, the first ones of each pipeline stage (with
    `parallel.virtual_pipeline` of each chunk of layers). None: all layers."""
    mlp_chunk_size: int | None = Field(default=None, ge=1, le=LONGEST)
    """Tokens that a dense feed-forward processes at a time. The backward pass computes its activations again, one chunk
    at a time: as slow as `recompute: [mlp]`, with a lower peak of memory. None: all tokens at once."""
    offload: list[OffloadedModule] = []
    """Parts whose inputs are kept in the memory of the host until the backward pass (megatron-core's fine-grained
    offloading): `qkv_linear`, `core_attn`, `attn_proj`, and in layers of experts `mlp_norm`, `expert_fc1`, `moe_act`.
    It needs GPUs and the layers of Transformer Engine."""
    train_only: list[Literal["router"]] | None = None
    """`[router]`: only the index of `attention.router` learns, all other weights stay as they are. None: everything
    learns."""
    gradient_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are accumulated and sent. `bf16` halves their memory while activations are held, and
    the bytes that are sent; it adds microbatches with less precision. Ranks are summed in fp32, from a copy. It needs
    `precision: bf16` and `parallel.distributed_optimizer`."""
    loss_chunk_size: int | None = Field(default=None, ge=1, le=LONGEST)
    """Tokens per chunk of the loss: at most chunk x vocabulary logits are in memory at once. None: 512 on a CPU, 4096
    on a GPU, where each chunk reads and writes the fp32 gradient of the output weight once."""
    on_divergence: Literal["stop", "skip", "rollback"] = "stop"
    """What happens when the loss or the gradient norm is not finite, before the update. `stop`: the run ends. `skip`:
    the step counts, but changes no weights. `rollback`: the run goes back to its newest checkpoint, and continues
    without the batch that diverged."""
    max_divergences: int = Field(default=3, ge=1)
    """Number of steps that one process may skip or roll back; the next one ends the run."""
    skip_batches: list[Annotated[int, Field(ge=1)]] = []
    """Steps, from 1, whose batch is left out: they count, but change no weights."""
    spike_threshold: float | None = Field(default=10.0, gt=0)
    """A loss is recorded as a spike if it exceeds the median of the last `spike_window` losses by more than this many
    spreads. A spread is 1.4826 x the median absolute deviation (for a normal distribution, the standard deviation).
    None: never."""
    spike_window: int = Field(default=100, ge=20)
    """Number of earlier losses that a loss is compared with; at least 20 must exist."""
    on_spike: Literal["record", "as_divergence"] = "record"
    """`record`: a spike is only recorded. `as_divergence`: it is handled by `on_divergence`."""
    replay: int | None = Field(default=None, ge=1)
    """Compute this step of the run in `run.dir` again, from the newest checkpoint before it, and write the loss, the
    gradient norm and the layers with values that are not finite into RUN/replay/step_N.json. The run itself does not
    change."""

    @field_validator("recompute", mode="before")
    @classmethod
    def _known_words(cls, value: Any) -> Any:
        """One error, where a union of types would make two."""
        words, parts = ("none", "selective", "full"), get_args(RecomputedModule)
        known = all(part in parts for part in value) if isinstance(value, list) else value in words
        if not known:
            use = f"use {', '.join(words)} or a list of {', '.join(parts)}"
            named = [part for part in value if isinstance(part, str)] if isinstance(value, list) else []
            stock = [part for part in named if part in OTHER_MODULES]
            reasons = "; ".join(f"{part} {OTHER_MODULES[part]}" for part in stock)
            raise ValueError(f"{reasons}: {use}" if reasons else use)
        return value

    def repeats(self, module: RecomputedModule) -> bool:
        """Whether the backward pass computes a part of a layer again."""
        words = {"none": [], "selective": ["core_attn"], "full": ["core_attn", "mlp", "moe", "shared_experts"]}
        return module in (words[self.recompute] if isinstance(self.recompute, str) else self.recompute)

    @property
    def feed_forward_passes(self) -> int:
        """How often a dense feed-forward is computed, the backward pass counted as two."""
        return 3 + self.repeats("mlp") + (self.mlp_chunk_size is not None)

    def tokens_of_loss_chunk(self, device_type: str) -> int:
        """`loss_chunk_size`, or its default on a kind of device ("cuda" or "cpu")."""
        return self.loss_chunk_size or (4096 if device_type == "cuda" else 512)


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    warmup_steps: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Optimizer steps of linear warm-up from 0."""
    decay: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay from lr to min_lr, over the steps after the warm-up. `WSD`: constant, then decay over the last
    `wsd_decay_steps`."""
    wsd_decay_steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Steps of the final decay of `WSD`."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; norms and biases are exempt."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient; 0: no clipping."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of Adam's first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of Adam's second moment."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Term added to Adam's denominator."""


class CheckpointConfig(Section):
    every: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Steps between checkpoints. None: only at the end and when stopped."""
    keep: int = Field(default=2, ge=1, le=MOST_STEPS)
    """Number of checkpoints that stay on disk, the newest ones."""
    resume: str = "auto"
    """`auto`: continue from the newest checkpoint in the run folder; without one, start a new run. `never`: start a new
    run, and refuse a folder that already holds one. A path: start from this `step_N` folder, or continue from the run's
    own newest checkpoint if it has one."""
    asynchronous: bool = True
    """Write checkpoints in the background during training."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What happens when a checkpoint cannot be written, as on a full disk. `stop`: the run ends. `continue`: it
    continues, and saves again at the next regular step; the last save of a process must succeed. Older checkpoints stay
    in both cases."""
    verify: bool = True
    """Before loading, compare the checkpoint's files with their recorded digests."""
    allow_changed: list[str] = []
    """Keys or sections, such as `attention` or `training.steps`, that may differ from the run that is resumed.
    Other settings that change the results must be the same; sizes of the parallel layout may always change."""


class EvaluationConfig(Section):
    every: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Steps between evaluations on `data.validation`. None: only at the end."""
    samples: int = Field(default=32, ge=1, le=2**31 - 1)
    """Validation samples per evaluation, always the same ones, spread over the data-parallel ranks."""
    trailing_tokens: int | None = Field(default=None, ge=1, le=LONGEST)
    """The trailing loss is the loss over this many last positions of the window. A position is the number of earlier
    tokens in the document, so with `data.cross_document_attention: false` only documents that fill the window count.
    Default: a sixteenth of the sequence, as the report's last 2K of 32K."""
    position_buckets: int = Field(default=16, ge=1, le=LONGEST)
    """Number of equal ranges of positions for the loss by position."""


def _yaml_off(value: Any) -> Any:
    """YAML 1.1 reads a bare `off` as false."""
    return "off" if value is False else value


class LoggingConfig(Section):
    every: int = Field(default=1, ge=1, le=MOST_STEPS)
    """Steps between lines on the console. metrics.jsonl always gets every step."""
    tensorboard: bool = True
    """Write TensorBoard events into RUN/tensorboard."""
    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(_yaml_off)] = "off"
    """Weights & Biases. `offline` needs no network: files stay in RUN/wandb until `wandb sync`."""
    wandb_project: str = Field(default="moba-megatron", min_length=1)
    """Project name for Weights & Biases."""
    profile_steps: list[int] = []
    """First and last step (counted from 1) to record with the PyTorch profiler; the trace goes to RUN/profile."""


class Config(Section):
    """Everything that a training run can be told."""

    run: RunConfig
    model: ModelConfig
    attention: AttentionConfig = AttentionConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.data.sequence_length

    @property
    def window(self) -> int:
        """Tokens that the model can take: what it is trained on, or what it was made for before, if that is more."""
        return max(self.data.sequence_length, self.model.max_position_embeddings or 0)

    @property
    def chunk_layers(self) -> list[int]:
        """Layers of each model chunk, in the order of the model; chunk i is on pipeline stage i modulo the stages."""
        chunks = self.parallel.pipeline * (self.parallel.virtual_pipeline or 1)
        return self.parallel.pipeline_layers or [self.model.num_layers // chunks] * chunks

    @property
    def packed(self) -> bool:
        """Whether a microbatch is a pack of documents that do not see each other."""
        return not self.data.cross_document_attention

    @property
    def trailing_tokens(self) -> int:
        return self.evaluation.trailing_tokens or max(1, self.data.sequence_length // 16)

    def to_yaml(self) -> str:
        """This configuration as YAML that `load_config` reads back to an equal one."""
        return yaml.dump(literal(self.model_dump(mode="json")), Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that begin as numbers do: OmegaConf takes more of them for numbers than PyYAML does (1e3)."""


def _quoted_number(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if re.match(r"[-+.]*[0-9]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted_number)
