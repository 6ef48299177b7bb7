"""Small configurations, a plain dense Llama to compare with, and a small training loop, for these tests."""

from __future__ import annotations

import copy

import torch

from moba_megatron.config import Config, config_from_dict

VOCABULARY = 61

TINY = {
    "run": {"dir": "unused"},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "vocab_size": VOCABULARY,
        "init_method_std": 0.2,
    },
    "attention": {"block_size": 8, "top_k": 2},
    "data": {"train": "unused", "tokenizer": "unused", "sequence_length": 64},
    "training": {"steps": 4, "global_batch_size": 2, "precision": "fp32", "loss_chunk_size": 16},
    "optimizer": {"lr": 1e-2},
}


def tiny(**sections: dict) -> Config:
    """A two-layer model of 32 channels; settings given by section override it."""
    values = copy.deepcopy(TINY)
    for section, settings in sections.items():
        values.setdefault(section, {}).update(settings)
    return config_from_dict(values)


def tokens(batch: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input ids, positions, labels), each [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (batch, length + 1), generator=generator)
    return ids[:, :-1].contiguous(), torch.arange(length).expand(batch, length), ids[:, 1:].contiguous()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def plain_llama_logits(model: torch.nn.Module, config: Config, ids: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, v] of the model's weights under plain dense causal attention, written without megatron-core."""
    shape = config.model
    heads, groups, size = shape.num_attention_heads, shape.query_groups, shape.head_size
    weights = dict(model.named_parameters())
    batch, length = ids.shape
    frequencies = shape.rotary_base ** (-torch.arange(0, size, 2) / size)
    if shape.rotary_scaling == "linear":
        frequencies = frequencies / shape.rotary_scaling_factor
    angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)[None, :, None]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape.layernorm_epsilon) * weight

    def rotate(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()

    x = weights["embedding.word_embeddings.weight"][ids]
    for number in range(shape.num_layers):
        layer = {
            name.removeprefix(f"decoder.layers.{number}."): weight
            for name, weight in weights.items()
            if name.startswith(f"decoder.layers.{number}.")
        }
        qkv = norm(x, layer["input_layernorm.weight"]) @ layer["self_attention.linear_qkv.weight"].t()
        q, k, v = qkv.view(batch, length, groups, -1, size).split([heads // groups, 1, 1], dim=3)
        q, k, v = rotate(q.flatten(2, 3)), rotate(k.flatten(2, 3)), v.flatten(2, 3)
        k, v = (tensor.repeat_interleave(heads // groups, dim=2) for tensor in (k, v))
        scores = torch.einsum("bthd,buhd->bhtu", q, k) / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        attended = torch.einsum("bhtu,buhd->bthd", scores.softmax(-1), v).flatten(2)
        x = x + attended @ layer["self_attention.linear_proj.weight"].t()
        gate, up = (norm(x, layer["pre_mlp_layernorm.weight"]) @ layer["mlp.linear_fc1.weight"].t()).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ layer["mlp.linear_fc2.weight"].t()
    return norm(x, weights["decoder.final_layernorm.weight"]) @ weights["output_layer.weight"].t()


def load_full_weights(chunks: list[torch.nn.Module], whole: dict[str, torch.Tensor], config: Config) -> None:
    """Copy this rank's part of a one-rank model's weights into its model chunks."""
    from megatron.core import parallel_state

    rank, size = parallel_state.get_tensor_model_parallel_rank(), config.parallel.tensor
    for chunk in chunks:
        # Layers are numbered from 0 again in each chunk; the layer itself knows its number, from 1.
        numbers = {
            f"decoder.layers.{i}.": f"decoder.layers.{layer.layer_number - 1}."
            for i, layer in enumerate(chunk.decoder.layers)
        }
        for name, parameter in chunk.named_parameters():
            source = next((new + name.removeprefix(old) for old, new in numbers.items() if name.startswith(old)), name)
            if name == "output_layer.weight" and config.model.share_embeddings_and_output_weights:
                source = "embedding.word_embeddings.weight"
            weight = whole[source]
            if weight.shape != parameter.shape:
                dim = parameter.partition_dim
                # The feed-forward input holds gate and up projections one after the other: split each.
                parts = weight.chunk(2, dim) if "linear_fc1" in name else [weight]
                weight = torch.cat([part.chunk(size, dim)[rank] for part in parts], dim)
            parameter.data.copy_(weight)


def pack(boundaries: list[int], max_seqlen: int, padded: list[int] | None = None):
    """megatron-core's description of a pack of documents with these boundaries."""
    from megatron.core.packed_seq_params import PackedSeqParams

    cu, wide = (None if b is None else torch.tensor(b, dtype=torch.int32) for b in (boundaries, padded))
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, cu_seqlens_q_padded=wide, cu_seqlens_kv_padded=wide,
        max_seqlen_q=max_seqlen, max_seqlen_kv=max_seqlen,
    )  # fmt: skip


def samples(config: Config, step: int, packs: list[list[int]] | None = None) -> list[dict]:
    """The global batch of a step as whole microbatches of one sample, each a pack of documents if `packs` says so."""
    found = []
    rows = zip(*tokens(config.training.global_batch_size, config.data.sequence_length, seed=step), strict=True)
    for number, (ids, positions, labels) in enumerate(rows):
        batch = {"tokens": ids[None], "labels": labels[None], "loss_mask": (labels[None] % 7 != 0).float()}
        if packs:
            boundaries = torch.tensor(packs[number % len(packs)], dtype=torch.int32)
            lengths = boundaries.diff()
            positions = positions - boundaries[:-1].repeat_interleave(lengths)
            batch |= {"cu_seqlens": boundaries, "max_seqlen": int(lengths.max())}
        found.append(batch | {"position_ids": positions[None]})
    return found


def rank_part(config: Config, batches: list[dict]) -> list[dict]:
    """What this context-parallel rank takes of whole microbatches, as the forward step wants them."""
    from megatron.core import parallel_state

    from moba_megatron.data.batches import context_part, packed_seq_params

    parallel = config.parallel
    if parallel.context > 1:
        rank, multiple = parallel_state.get_context_parallel_rank(), parallel.tensor if parallel.sequence else 1
        batches = [context_part(batch, rank, parallel.context, tokens_multiple=multiple) for batch in batches]
    return [{**batch, "packed_seq_params": packed_seq_params(batch)} for batch in batches]


def loss_of_batch(
    config: Config, wrapped: list[torch.nn.Module], step: int, packs: list[list[int]] | None = None
) -> float:
    """Forward and backward of the global batch of a step through megatron-core's schedule: the mean loss."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from moba_megatron.model.forward import forward_step, microbatch_shape, reduce_over_ranks

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = rank_part(config, samples(config, step, packs)[rank::size])
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(mine) for _ in wrapped] if len(wrapped) > 1 else iter(mine),
        model=wrapped if len(wrapped) > 1 else wrapped[0],
        num_microbatches=len(mine),
        **microbatch_shape(config.data, 1),
        forward_only=False,
    )
    total, count = reduce_over_ranks([report["sums"] for report in reports], (2,)).tolist()
    return total / count


def train(
    config: Config,
    vocabulary: int,
    steps: int,
    whole: dict[str, torch.Tensor] | None = None,
    packs: list[list[int]] | None = None,
):
    """A few optimizer steps through megatron-core's own schedule, data parallel wrapper and optimizer.

    Args:
        whole: weights of a one-rank model to start from.
        packs: document boundaries of the samples, in turn; default: a sample is one sequence.

    Returns:
        (loss of each step, gradient norm of each step, weights at the end by name).
    """
    from moba_megatron import platform
    from moba_megatron.model.builder import build_model
    from moba_megatron.model.exchange_choice import resolve_exchange
    from moba_megatron.model.schedule import AttentionSchedule
    from moba_megatron.training.optimizer import build_optimizer, wrap_data_parallel

    platform.start_model_parallel(config.parallel, resolve_exchange(config).levels)
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    chunks = build_model(config, vocabulary, schedule)
    if whole is not None:
        load_full_weights(chunks, whole, config)
    wrapped = wrap_data_parallel(chunks, config)
    optimizer = build_optimizer(wrapped, config)
    losses, norms = [], []
    for step in range(steps):
        for model in wrapped:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        losses.append(loss_of_batch(config, wrapped, step, packs))
        _, norm, _ = optimizer.step()
        norms.append(norm)
    return losses, norms, {name: p.detach().clone() for chunk in chunks for name, p in chunk.named_parameters()}


def train_each(configs: list[Config], *args):
    """`train` with each configuration in turn, in the same processes: a list of (losses, gradient norms)."""
    from megatron.core import parallel_state

    results = []
    for config in configs:
        results.append(train(config, *args)[:2])
        parallel_state.destroy_model_parallel()
    return results
