"""A new run starts from the same weights at every layout: those that one rank draws, bit for bit."""

from __future__ import annotations

import functools

import pytest
import torch
from distributed import run_ranks
from model_examples import load_full_weights, loss_of_batch, tiny

from moba_megatron.config import Config

VOCABULARY = 62
MODELS = {
    "plain": ("fp32", {}),
    "tied": ("bf16", {"share_embeddings_and_output_weights": True}),
    "Qwen": ("fp32", {"add_qkv_bias": True, "qk_layernorm": True, "kv_channels": 16}),
}
LAYOUTS = {
    "TP2": {"tensor": 2},
    "TP2 SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP2 uneven": {"pipeline": 2, "pipeline_layers": [4, 0]},
    "PP2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "CP2": {"context": 2},
    "DP2": {},
    "TP2 PP2 interleaved": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
    "TP2 CP2": {"tensor": 2, "context": 2},
}


def settings(kind: str, layout: dict) -> Config:
    precision, model = MODELS[kind]
    model = {"num_layers": 4, "vocab_size": VOCABULARY, **model}
    training = {"precision": precision, "global_batch_size": 4}
    return tiny(model=model, parallel=layout, training=training, attention={"key_convolution": 3})


def build(config: Config, vocabulary: int = VOCABULARY) -> list[torch.nn.Module]:
    from megatron.core import parallel_state

    from moba_megatron import platform
    from moba_megatron.model.builder import build_model
    from moba_megatron.model.schedule import AttentionSchedule

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    platform.start_model_parallel(config.parallel)
    return build_model(config, vocabulary, AttentionSchedule.from_config(config.attention, config.model.num_layers))


def first_loss(config: Config, chunks: list[torch.nn.Module]) -> float:
    from moba_megatron.training.optimizer import wrap_data_parallel

    return loss_of_batch(config, wrap_data_parallel(chunks, config), 0)


@functools.cache
def one_rank() -> dict[str, tuple[dict[str, torch.Tensor], float]]:
    """Weights and first loss of every model."""

    def draw():
        found = {}
        for kind in MODELS:
            config = settings(kind, {})
            chunks = build(config)
            weights = {name: p.detach().clone() for name, p in chunks[0].named_parameters()}
            found[kind] = weights, first_loss(config, chunks)
        return found

    return run_ranks(1, draw)[0]


def held_against_one_rank(layouts: dict[str, dict]) -> tuple[list[tuple[str, ...]], dict[str, float]]:
    """Which weights of this rank are not its part of those of one rank, and the first loss of the plain model."""
    found, losses = [], {}
    for name, layout in layouts.items():
        for kind, (whole, _) in one_rank().items():
            config = settings(kind, layout)
            chunks = build(config)
            drawn = [(n, p, p.detach().clone()) for chunk in chunks for n, p in chunk.named_parameters()]
            load_full_weights(chunks, whole, config)
            found += [(kind, name, n) for n, p, before in drawn if not torch.equal(p, before)]
            if kind == "plain":
                losses[name] = first_loss(config, chunks)
    return found, losses


@pytest.mark.parametrize("ranks", [2, 4])
def test_weights_and_first_loss_are_those_of_one_rank(ranks):
    _, expected = one_rank()["plain"]  # made here, not in every rank
    layouts = {name: layout for name, layout in LAYOUTS.items() if ranks == (4 if name.count("2") > 1 else 2)}
    assert len(layouts) == (2 if ranks == 4 else 7)
    for differing, losses in run_ranks(ranks, held_against_one_rank, layouts, timeout=300):
        assert differing == []
        assert losses == pytest.approx(dict.fromkeys(layouts, expected), rel=1e-6)


def test_padding_of_the_vocabulary_takes_no_draws():
    def embedding(layout: dict) -> list[torch.Tensor]:
        weights = dict(build(settings("plain", layout), 61)[0].named_parameters())
        return [weights[name].detach().clone() for name in ("embedding.word_embeddings.weight", "output_layer.weight")]

    (whole,) = run_ranks(1, embedding, {})
    for parts, one in zip(zip(*run_ranks(2, embedding, {"tensor": 2}), strict=True), whole, strict=True):
        assert torch.equal(torch.cat(parts), torch.cat([one, torch.zeros(1, one.shape[1])]))


def test_random_streams_stay_those_of_the_rank():
    """Dropout draws from them. The build itself advances them as megatron-core does."""
    from megatron.core import tensor_parallel

    def streams(replayed: bool) -> tuple[torch.Tensor, ...]:
        from moba_megatron.model import builder

        if not replayed:
            builder.replay_draws = lambda *args, **settings: None
        build(settings("plain", {"tensor": 2}))
        states = tensor_parallel.get_cuda_rng_tracker().get_states()
        return torch.get_rng_state(), *(states[name] for name in sorted(states))

    for ours, stock in zip(run_ranks(2, streams, True), run_ranks(2, streams, False), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))
