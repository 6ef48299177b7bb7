"""A tiny model trains through megatron-core's schedules; every parallel layout gives the losses of one rank."""

import pytest
import torch
from distributed import run_ranks
from model_examples import tiny, train

VOCABULARY = 62
STEPS = 3


def config(**sections):
    sections.setdefault("model", {}).update(num_layers=4, vocab_size=VOCABULARY)
    return tiny(
        attention={"block_size": 8, "top_k": 2, "last_n_full": 1},
        training={"steps": STEPS, "global_batch_size": 4, "precision": "fp32", "loss_chunk_size": 24},
        **sections,
    )


def assert_same_course(results, losses: list[float], norms: list[float]) -> None:
    """The last rank has the losses, every rank the gradient norms.

    The first step is a sum of the same numbers in another order: a few roundings apart. Adam divides each gradient by
    its own size, so where a gradient is itself a rounding error the update is not; after that, courses drift apart by a
    small part of what a step changes (lr = 1e-2, losses move by 0.3 a step).
    """
    assert results[-1][0]
    for rank_losses, rank_norms, _ in results:
        for ours, expected in ((rank_losses or losses, losses), (rank_norms, norms)):
            torch.testing.assert_close(ours[:1], expected[:1], rtol=2e-6, atol=0)
            torch.testing.assert_close(ours[1:], expected[1:], rtol=3e-4, atol=0)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def one_rank(request):
    """(tied or not, initial weights, losses, gradient norms) of a run on one rank."""
    shape = {"share_embeddings_and_output_weights": request.param, "qk_layernorm": True}
    _, _, weights = run_ranks(1, train, config(model=dict(shape)), VOCABULARY, 0)[0]
    losses, norms, _ = run_ranks(1, train, config(model=dict(shape)), VOCABULARY, STEPS, weights)[0]
    return shape, weights, losses, norms


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {}),
        (2, {"distributed_optimizer": True}),
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence": True}),
        (2, {"pipeline": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    ],
    ids=["dp2", "dp2-distributed", "tp2", "tp2-sp", "pp2", "pp2-vp2", "tp2-sp-pp2"],
)
def test_layouts_agree(one_rank, ranks, parallel):
    shape, weights, losses, norms = one_rank
    assert losses[0] > losses[-1] > 0
    results = run_ranks(ranks, train, config(model=dict(shape), parallel=parallel), VOCABULARY, STEPS, weights)
    assert_same_course(results, losses, norms)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"pipeline": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    ],
    ids=["pp2", "pp2-vp2", "tp2-sp-pp2"],
)
def test_packed_documents_reach_every_pipeline_stage(ranks, parallel):
    shape, boundaries = {"qk_layernorm": False}, [0, 30, 31, 64]
    _, _, weights = run_ranks(1, train, config(model=dict(shape)), VOCABULARY, 0)[0]
    losses, norms, _ = run_ranks(1, train, config(model=dict(shape)), VOCABULARY, STEPS, weights, boundaries)[0]
    whole, _, _ = run_ranks(1, train, config(model=dict(shape)), VOCABULARY, STEPS, weights)[0]
    assert abs(whole[0] - losses[0]) > 1e-3  # the boundaries matter
    packed = config(model=dict(shape), parallel=parallel)
    results = run_ranks(ranks, train, packed, VOCABULARY, STEPS, weights, boundaries)
    assert_same_course(results, losses, norms)


def test_bf16_trains():
    shape = {"num_layers": 4, "vocab_size": VOCABULARY}
    bf16 = tiny(model=shape, training={"precision": "bf16"}, parallel={"distributed_optimizer": True})
    fp32 = tiny(model=shape, training={"precision": "fp32"})
    _, _, weights = run_ranks(1, train, fp32, VOCABULARY, 0)[0]
    exact = run_ranks(1, train, fp32, VOCABULARY, STEPS, weights)[0]
    for losses, norms, _ in run_ranks(2, train, bf16, VOCABULARY, STEPS, weights):
        torch.testing.assert_close(losses, exact[0], rtol=0, atol=0.05)
        torch.testing.assert_close(norms, exact[1], rtol=0.1, atol=0)
