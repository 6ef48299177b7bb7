"""Bytes that one layer keeps for its backward pass, and the extra bytes of one backward pass, computed from sizes.

Found by listing the tensors that autograd saves in our stack, and compared with measured peaks. t tokens of a rank,
hidden h, feed-forward f, N query and G key heads of size D, e bytes an element. What one layer keeps:

| what | GPU (Transformer Engine) | CPU |
|---|---|---|
| two norms: input, normalised input (fp32 in the CPU's norm), output | 2 t h (e + e) | 2 t h (8 + e) |
| rotated queries and keys, the joint projection (values are a part of it), the output | t D e (3 N + 3 G) | the same |
| under `a2a`, beside the traded queries, keys, values and output: the output at home | t D e (3 N + 2 G) | the same |
| cosine and sine, for queries and for keys | in one kernel: 0 | 4 t D e |
| gate and up, then the product (CPU: their parts as well) | 3 t f e | 5 t f e |
| attention's log-sum-exp, and MoBA's chosen blocks | t N (4 + 4 (K - 1)) | the same |

Tensor parallelism divides heads and feed-forward, sequence parallelism the norms. `selective` recomputation drops the
last row, `full` keeps t h e. In a mixture of experts the feed-forward is that of the shared expert, and the others have
`memory_experts`, and an index that chooses blocks has `index_shape`.

Layers whose index alone learns (`training.train_only`) have no other backward pass (`model.frozen`). They keep what the
index keeps, and the normalised hidden states that it reads: `index_bytes`. The most of a layer is then alive in its
forward pass, as in an evaluation: `forward_bytes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moba_megatron.config import Config, TrainingConfig
from moba_megatron.model.schedule import LayerAttention
from moba_megatron.ops.gathered.index import ENTRY_BYTES, default_entries
from moba_megatron.ops.kernel_sizes import backward_entry_bytes, default_workspace, forward_entry_bytes
from moba_megatron.parallel.exchange_kind import ExchangeKind, RankSizes
from moba_megatron.parallel.exchanges import EXCHANGES
from moba_megatron.planning.expert_shape import ExpertShape
from moba_megatron.planning.index_shape import IndexShape
from moba_megatron.planning.memory_experts import expert_layer_bytes, expert_working_bytes
from moba_megatron.planning.plan_stages import tokens_of_rank


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer and microbatch on one rank.

    Attributes:
        norms, attention, mlp: kept for backward; `selected`: log-sum-exp and chosen blocks, kept as well.
        entry: the layer's input, all that `full` recomputation keeps.
    """

    norms: int
    attention: int
    mlp: int
    selected: int
    entry: int

    @property
    def kept(self) -> int:
        """What a layer without recomputation keeps, chosen blocks aside."""
        return self.norms + self.attention + self.mlp


@dataclass(frozen=True)
class Shape:
    """Sizes of one rank that every formula here needs; `workspace_bytes` as in the settings; `experts` and `shared`,
    the width of the shared expert, are of layers with experts."""

    tokens: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    width: int
    norm_split: int
    cuda: bool
    workspace_bytes: int | None = None
    experts: ExpertShape | None = None
    shared: int = 0
    shared_gate: bool = False
    index: IndexShape | None = None

    @classmethod
    def of(cls, config: Config, device_type: str) -> Shape:
        """The shape of a configuration's rank; `width` is the size of an element in bytes."""
        model, tensor = config.model, config.parallel.tensor
        return cls(
            tokens=tokens_of_rank(config),
            hidden=model.hidden_size,
            ffn=model.ffn_size // tensor,
            heads=model.num_attention_heads // tensor,
            kv_heads=model.query_groups // tensor,
            head_size=model.head_size,
            width=2 if config.training.precision == "bf16" else 4,
            norm_split=tensor if config.parallel.sequence else 1,
            cuda=device_type == "cuda",
            workspace_bytes=config.attention.workspace_bytes,
            experts=ExpertShape.of(config),
            shared=(model.moe_shared_expert_intermediate_size or 0) // tensor,
            shared_gate=model.moe_shared_expert_gate,
            index=IndexShape.of(config.attention, model, tensor),
        )

    @property
    def stream(self) -> int:
        """Bytes of the residual stream."""
        return self.tokens * self.hidden * self.width // self.norm_split


def layer_bytes(shape: Shape, layer: LayerAttention, exchange: str | None, experts: bool = False) -> LayerBytes:
    """Bytes that one layer keeps.

    Args:
        exchange: of this kind of layer under context parallelism, None without.
        experts: whether its feed-forward is a mixture of experts.
    """
    t, size, width = shape.tokens, shape.head_size, shape.width
    norm = shape.width + (shape.width if shape.cuda else 8)
    saved_kv = ExchangeKind.saved_kv if exchange is None else EXCHANGES[exchange].saved_kv
    shards = 3 * shape.heads + saved_kv * shape.kv_heads
    rotary = 0 if shape.cuda else 4
    past = 0 if layer.kind == "full" else layer.top_k - 1
    of_index, learned = _of_index(shape, layer)
    return LayerBytes(
        norms=2 * norm * t * shape.hidden // shape.norm_split,
        attention=t * size * width * (shards + rotary) + of_index,
        mlp=_mlp_bytes(shape, experts),
        selected=t * shape.heads * (4 + 4 * past) + learned,
        entry=shape.stream,
    )


def _of_index(shape: Shape, layer: LayerAttention) -> tuple[int, int]:
    """Bytes that the index of a layer keeps: of its queries and keys, and of its loss."""
    if shape.index is None or layer.kind == "full":
        return 0, 0
    tokens, blocks = shape.tokens, shape.tokens // (layer.block_size or shape.tokens)
    return shape.index.kept_bytes(tokens, shape.width), shape.index.loss_bytes(tokens, layer.top_k - 1, blocks)


def index_bytes(shape: Shape, layer: LayerAttention) -> int:
    """All that a layer keeps for its backward pass if its index alone learns."""
    kept = sum(_of_index(shape, layer))
    return kept + shape.stream if kept else 0


def forward_bytes(training: TrainingConfig, shape: Shape, layer: LayerAttention, bytes_: LayerBytes) -> tuple[int, int]:
    """The most alive in the forward pass of a layer that keeps nothing, in its attention (without the buffers of an
    exchange) and in its feed-forward: the stream before and after, a norm, and the tensors of the one or the other.

    Args:
        bytes_: that the layer would keep.
    """
    around = 2 * shape.stream + bytes_.norms // 2
    chunk = training.mlp_chunk_size
    mlp = bytes_.mlp if chunk is None else bytes_.mlp * min(chunk, shape.tokens) // shape.tokens
    return around + bytes_.attention + bytes_.selected + _forward_workspace(shape, layer), around + mlp


def _forward_workspace(shape: Shape, layer: LayerAttention) -> int:
    """What the backend keeps of the chosen blocks."""
    if layer.kind == "full":
        return 0
    queries = shape.tokens * shape.heads * shape.head_size
    slots = math.ceil(shape.tokens * shape.heads * (layer.mean_blocks - 1))
    if shape.cuda:
        room = shape.workspace_bytes or default_workspace(queries * shape.width)
        return min(room, slots * forward_entry_bytes(shape.head_size, shape.width))
    entries = min(default_entries(shape.tokens * shape.heads // shape.kv_heads), slots)
    return entries * (shape.head_size * shape.width + ENTRY_BYTES)


def _mlp_bytes(shape: Shape, experts: bool) -> int:
    if not experts or shape.experts is None:
        return _parts(shape) * shape.tokens * shape.ffn * shape.width
    return expert_layer_bytes(shape.experts, shape.cuda) + _shared_bytes(shape)


def _parts(shape: Shape) -> int:
    return 3 if shape.cuda else 5


def _shared_bytes(shape: Shape) -> int:
    # The gate of a shared expert multiplies its output.
    return _parts(shape) * shape.tokens * shape.shared * shape.width + shape.stream * shape.shared_gate


def repeated_mlp_bytes(training: TrainingConfig, shape: Shape, experts: bool) -> tuple[int, int]:
    """What of a layer's feed-forward is not kept, and what is made again of it at a time for its backward pass alone.
    Under `full` the whole layer is made again: what then is kept until its backward pass counts there."""
    whole = _mlp_bytes(shape, experts)
    if training.mlp_chunk_size is not None and not experts:
        return whole, _mlp_bytes(_chunk(training, shape), experts)
    if isinstance(training.recompute, str):
        return 0, 0
    if training.repeats("moe" if experts else "mlp"):
        return whole, whole
    shared = _shared_bytes(shape) if experts and training.repeats("shared_experts") else 0
    return shared, shared


def _chunk(training: TrainingConfig, shape: Shape) -> Shape:
    """The shape of the tokens that a dense feed-forward processes at a time."""
    return replace(shape, tokens=min(training.mlp_chunk_size or shape.tokens, shape.tokens))


def mlp_working_bytes(training: TrainingConfig, shape: Shape, experts: bool = False) -> int:
    """Extra bytes in memory at once in the feed-forward. Backward: gradients of gate and up, of the stream around it
    (under sequence parallelism with what is gathered), of a weight; `experts` need the most forward."""
    if experts and shape.experts is not None:
        return max(expert_working_bytes(shape.experts), _dense_working_bytes(shape, shape.shared))
    if training.mlp_chunk_size is None:
        return _dense_working_bytes(shape, shape.ffn)
    # Beside one chunk: the gradients that came and that leave, and those of the weights in fp32.
    gradients = 2 * shape.tokens * shape.hidden * shape.width // shape.norm_split
    return _dense_working_bytes(_chunk(training, shape), shape.ffn) + gradients + 3 * shape.ffn * shape.hidden * 4


def _dense_working_bytes(shape: Shape, ffn: int) -> int:
    streams = 2 if shape.norm_split == 1 else 4
    around = streams * shape.tokens * shape.hidden * shape.width
    return 2 * shape.tokens * ffn * shape.width + around + 2 * ffn * shape.hidden * shape.width


@dataclass(frozen=True)
class Offloaded:
    """Bytes of one layer and microbatch that `training.offload` frees on the device until the backward pass: of its
    activations (`kept`) and of its chosen blocks and log-sum-exps (`selected`); and what travels to the host."""

    kept: int = 0
    selected: int = 0
    moved: int = 0


def offloaded(training: TrainingConfig, shape: Shape, bytes_: LayerBytes) -> Offloaded:
    """What leaves the device of one layer. Of experts nothing is counted."""
    modules, width = training.offload, shape.width
    # The input of the projection; Transformer Engine's has the norm in it, and so keeps the norm's input too.
    inputs = (1 + shape.cuda) * shape.tokens * shape.hidden * width // shape.norm_split * ("qkv_linear" in modules)
    if "core_attn" not in modules:
        return Offloaded(inputs, 0, inputs)
    output, projected = shape.tokens * shape.heads * shape.head_size * width, "attn_proj" in modules
    # Queries, keys, values and output; the rest of the joint projection is free with its values.
    moved = 2 * output + 2 * shape.tokens * shape.kv_heads * shape.head_size * width + bytes_.selected
    # The output projection keeps attention's output, too, and sends it once more.
    freed, moved = bytes_.attention - output * (not projected), moved + output * projected
    return Offloaded(inputs + freed, bytes_.selected, inputs + moved)


def attention_backward_bytes(shape: Shape, layer: LayerAttention) -> int:
    """Gradients alive at once in attention's backward (of queries also in fp32), and the backend's workspace."""
    t, size, width = shape.tokens, shape.head_size, shape.width
    queries, keys = t * shape.heads * size, t * shape.kv_heads * size
    gradients = queries * (4 + 4 * width) + keys * (6 * width + 8 // shape.kv_heads)
    if shape.norm_split > 1:  # what comes and what leaves, gathered
        gradients += 2 * t * shape.hidden * width
    if layer.kind == "full":
        return gradients
    entries = math.ceil(t * shape.heads * (layer.mean_blocks - 1))
    if shape.cuda:
        room = shape.workspace_bytes or default_workspace(queries * width)
        return gradients + min(room, entries * backward_entry_bytes(size, width))
    rows, entry_bytes = t * shape.heads // shape.kv_heads, size * width + ENTRY_BYTES
    room = shape.workspace_bytes or default_entries(rows) * entry_bytes
    return gradients + min(room, entries * entry_bytes) + 4 * queries


def exchange_bytes(config: Config, shape: Shape, layer: LayerAttention, exchange: str | None) -> int:
    """Buffers of context parallelism in a backward pass of one layer; none without an exchange."""
    if exchange is None:
        return 0
    sizes = RankSizes(
        shape.tokens, shape.heads, shape.kv_heads, shape.head_size, shape.width, layer.block_size, layer.top_k
    )
    given = config.parallel.hierarchical_context
    levels = (given[0], given[1]) if given else None
    return EXCHANGES[exchange].buffers(sizes, config.parallel.context, levels)
