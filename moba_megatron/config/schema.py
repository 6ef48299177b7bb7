"""Every setting, with its type, its bounds, its unit and the reason for its default.

The docstring below a field is its documentation: `docs/configuration.md` is made from it. Paths are relative to the
working directory. Sizes are in tokens unless the field names another unit.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, field_validator

from moba_megatron.config.attention import AttentionConfig
from moba_megatron.config.literal import literal
from moba_megatron.config.model import ModelConfig
from moba_megatron.config.parallel import ParallelConfig
from moba_megatron.config.section import LONGEST, MOST_STEPS, Section


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
    """`[router]`: only the index of `attention.router` learns, all other weights stay as they are. A step then costs
    little more than a forward pass, and keeps little for the backward pass. None: everything learns."""
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

    def passes(self, part: Literal["attention", "mlp", "moe", "shared_experts"]) -> int:
        """How often the matrix products of a part of a layer are made, the backward pass counted as two. Layers
        whose index alone learns have none."""
        if self.train_only is not None:
            return 1 + (self.recompute == "full")
        if part == "attention":
            return 3 + (self.recompute == "full")
        return 3 + self.repeats(part) + (part == "mlp" and self.mlp_chunk_size is not None)

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
    """Decoupled weight decay; norms, biases and the indexes of `attention.router` are exempt."""
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
