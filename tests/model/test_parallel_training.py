"""A tiny model trains through megatron-core's schedules; every parallel layout gives the losses of one rank."""

import pytest
import torch
from distributed import run_ranks
from model_examples import tiny, train, train_each

from moba_megatron.training import optimizer

pytestmark = pytest.mark.usefixtures("small_buckets")
VOCABULARY = 62
STEPS = 3


def config(training=None, **sections):
    sections.setdefault("model", {}).update(num_layers=4, vocab_size=VOCABULARY)
    same = {"steps": STEPS, "global_batch_size": 4, "precision": "fp32", "loss_chunk_size": 24}
    return tiny(
        attention={"block_size": 8, "top_k": 2, "last_n_full": 1}, training={**same, **(training or {})}, **sections
    )


def assert_same_course(results, losses: list[float], norms: list[float]) -> None:
    """Every rank has the losses and gradient norms of one rank.

    The first step is a sum of the same numbers in another order: a few roundings apart. Adam divides each gradient by
    its own size, so where a gradient is itself a rounding error the update is not; after that, courses drift apart by a
    small part of what a step changes (lr = 1e-2, losses move by 0.3 a step).
    """
    for rank_losses, rank_norms in results:
        for ours, expected in ((rank_losses, losses), (rank_norms, norms)):
            torch.testing.assert_close(ours[:1], expected[:1], rtol=2e-6, atol=0)
            torch.testing.assert_close(ours[1:], expected[1:], rtol=3e-4, atol=0)


def assert_layouts_agree(ranks: int, layouts: list[dict], shape: dict, weights, one_rank, packs=None) -> None:
    """Train at each layout on the same processes, and compare the losses of each with those of one rank."""
    configs = [config(model=dict(shape), parallel=parallel) for parallel in layouts]
    results = run_ranks(ranks, train_each, configs, VOCABULARY, STEPS, weights, packs)
    for number, parallel in enumerate(layouts):
        try:
            assert_same_course([rank[number] for rank in results], *one_rank)
        except AssertionError as error:
            raise AssertionError(f"{parallel} differs from one rank: {error}") from error


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def one_rank(request):
    """(tied or not, initial weights, losses, gradient norms) of a run on one rank."""
    shape = {"share_embeddings_and_output_weights": request.param, "qk_layernorm": True}
    _, _, weights = run_ranks(1, train, config(model=dict(shape)), VOCABULARY, 0)[0]
    losses, norms, _ = run_ranks(1, train, config(model=dict(shape)), VOCABULARY, STEPS, weights)[0]
    return shape, weights, losses, norms


INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
SHARDED = {"tensor": 2, "sequence": True}
OVERLAPPED = {"overlap_grad_reduce": True}


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (2, [{}, {"distributed_optimizer": True}, OVERLAPPED, {"distributed_optimizer": True, **OVERLAPPED}]),
        (2, [{"tensor": 2}, SHARDED]),
        (2, [{"pipeline": 2}, INTERLEAVED]),
        (4, [{**SHARDED, "pipeline": 2}]),
    ],
    ids=["data", "tensor", "pipeline", "tensor-pipeline"],
)
def test_layouts_agree(one_rank, ranks, layouts):
    shape, weights, losses, norms = one_rank
    assert losses[0] > losses[-1] > 0
    assert_layouts_agree(ranks, layouts, shape, weights, (losses, norms))


def test_uneven_pipelines_agree(one_rank):
    """Any number of layers in a stage, none included: the embedding or the loss alone, or nothing at all."""
    shape, weights, losses, norms = one_rank
    layouts = [{"pipeline": 2, "pipeline_layers": layers} for layers in ([3, 1], [1, 3], [4, 0], [0, 4])]
    layouts += [{**INTERLEAVED, "pipeline_layers": layers} for layers in ([1, 2, 1, 0], [2, 0, 1, 1])]
    layouts += [{**layout, **OVERLAPPED} for layout in layouts[2:5]]
    assert_layouts_agree(2, layouts, shape, weights, (losses, norms))


# 64 tokens a sample, four layers.
SAVINGS = [
    (1, {}, {"mlp_chunk_size": 24}),
    (1, {}, {"mlp_chunk_size": 1000, "recompute": ["core_attn"]}),
    (1, {}, {"mlp_chunk_size": 24, "recompute": "full", "recompute_layers": 3}),
    (2, {"distributed_optimizer": True, **OVERLAPPED}, {"mlp_chunk_size": 24}),
    (2, SHARDED, {"mlp_chunk_size": 24}),
    (2, SHARDED, {"mlp_chunk_size": 1, "recompute": "full"}),
    (2, {"context": 2, **OVERLAPPED}, {"mlp_chunk_size": 24, "recompute": "full", "recompute_layers": 1}),
    (2, {**INTERLEAVED, **OVERLAPPED}, {"mlp_chunk_size": 24, "recompute": "full", "recompute_layers": 1}),
    (2, {"pipeline": 2, "pipeline_layers": [3, 1]}, {"recompute": "full", "recompute_layers": 2}),
]


@pytest.mark.parametrize("one_rank", [False], ids=["untied"], indirect=True)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_savings_of_memory_agree(one_rank, ranks):
    """The feed-forward in chunks, and recomputation of some layers, in every layout."""
    shape, weights, losses, norms = one_rank
    cases = [(parallel, training) for size, parallel, training in SAVINGS if size == ranks]
    configs = [config(training, model=dict(shape), parallel=parallel) for parallel, training in cases]
    results = run_ranks(ranks, train_each, configs, VOCABULARY, STEPS, weights)
    for number, case in enumerate(cases):
        try:
            assert_same_course([rank[number] for rank in results], losses, norms)
        except AssertionError as error:
            raise AssertionError(f"{case} differs from one rank: {error}") from error


def courses_by_gradient(configs):
    """(losses, norms) of each configuration, and the dtype of its gradients."""
    from megatron.core import distributed

    kinds, wrap = [], optimizer.DistributedDataParallel

    def recorded(*args, **settings):
        wrapped = wrap(*args, **settings)
        kinds.append({parameter.main_grad.dtype for parameter in wrapped.parameters()})
        return wrapped

    assert wrap is distributed.DistributedDataParallel
    optimizer.DistributedDataParallel = recorded
    return train_each(configs, VOCABULARY, STEPS), kinds


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_in_bf16(ranks):
    """They are half as large, and train as fp32 ones but for their rounding (2^-9 a number)."""
    parallel = {"distributed_optimizer": True, "overlap_grad_reduce": True}
    whole, half = [
        config({"precision": "bf16", "gradient_precision": precision}, parallel=parallel)
        for precision in ("fp32", "bf16")
    ]
    for courses, kinds in run_ranks(ranks, courses_by_gradient, [whole, half]):
        assert kinds == [{torch.float32}, {torch.bfloat16}]
        (expected, norms), (losses, found) = courses
        assert losses[0] == expected[0] and losses[1:] != expected[1:]
        torch.testing.assert_close(losses, expected, rtol=2e-2, atol=0)
        torch.testing.assert_close(found[:1], norms[:1], rtol=4e-3, atol=0)


PACKS = [[0, 30, 31, 64], [0, 64], [0, 5, 9, 40, 63, 64], [0, 33, 64]]
"""Documents of the four samples of a step: padded for context parallelism, each makes a pack of another length."""


@pytest.fixture(scope="module")
def one_rank_packed():
    """As `one_rank`, with a pack of documents in each sample."""
    shape = {"qk_layernorm": False}
    _, _, weights = run_ranks(1, train, config(model=dict(shape)), VOCABULARY, 0)[0]
    losses, norms, _ = run_ranks(1, train, config(model=dict(shape)), VOCABULARY, STEPS, weights, PACKS)[0]
    whole, _, _ = run_ranks(1, train, config(model=dict(shape)), VOCABULARY, STEPS, weights)[0]
    assert abs(whole[0] - losses[0]) > 1e-3  # the boundaries matter
    return shape, weights, losses, norms


PARTLY_ROTATED = {"rotary_percent": 0.75, "no_rope_freq": [0, 1, 0, 1]}
YARN = {"rotary_scaling": "yarn", "rotary_scaling_factor": 4.0, "rotary_original_length": 16}


@pytest.mark.parametrize("shape", [PARTLY_ROTATED, {**PARTLY_ROTATED, **YARN}], ids=["part", "part-yarn"])
def test_layouts_agree_where_not_everything_is_rotated(shape):
    """Layers know by their number in the whole model whether they are rotated, and packs rotate the same channels."""
    _, _, weights = run_ranks(1, train, config(model=dict(shape)), VOCABULARY, 0)[0]
    losses, norms, _ = run_ranks(1, train, config(model=dict(shape)), VOCABULARY, STEPS, weights, PACKS)[0]
    plain, _, _ = run_ranks(1, train, config(), VOCABULARY, STEPS, weights, PACKS)[0]
    assert abs(plain[0] - losses[0]) > 1e-3
    layouts = [{"pipeline": 2, "pipeline_layers": [3, 1]}, INTERLEAVED, {"tensor": 2}, {"context": 2}]
    assert_layouts_agree(2, layouts, shape, weights, (losses, norms), PACKS)


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (2, [{"pipeline": 2}, INTERLEAVED, {"context": 2}, {"context": 2, "exchange": "p2p"}]),
        pytest.param(
            4,
            [
                {**SHARDED, "pipeline": 2},
                {"context": 4, "exchange": "a2a+p2p"},
                {"context": 2, "distributed_optimizer": True},
                {"context": 2, "exchange": "dispatch", "distributed_optimizer": True, **OVERLAPPED},
                {"context": 2, **INTERLEAVED},
                {"context": 2, **INTERLEAVED, **OVERLAPPED},
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["two", "four"],
)
def test_layouts_agree_on_packed_documents(one_rank_packed, ranks, layouts):
    shape, weights, losses, norms = one_rank_packed
    assert_layouts_agree(ranks, layouts, shape, weights, (losses, norms), PACKS)


def reductions_of_each_step(settings):
    """How many buckets a rank had sent off when the backward pass of each step was over, and how many there are."""
    from megatron.core.distributed import param_and_grad_buffer

    sent, seen = [], []
    groups, finalize = param_and_grad_buffer._ParamAndGradBucketGroup, optimizer.finalize_model_grads
    start = groups.start_grad_sync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "start_grad_sync", lambda self, **how: (sent.append(self), start(self, **how)))
        patch.setattr(
            optimizer, "finalize_model_grads", lambda *args, **how: (seen.append(len(sent)), finalize(*args, **how))
        )
        train(settings, VOCABULARY, STEPS)
    return seen, len(set(sent))


def test_gradients_leave_while_others_are_made():
    for seen, groups in run_ranks(2, reductions_of_each_step, config(parallel=dict(OVERLAPPED))):
        # megatron-core learns in the first step how often each gradient is added to.
        assert groups > 4 and seen == [0, 2 * groups, 3 * groups]
    for seen, groups in run_ranks(2, reductions_of_each_step, config()):
        assert (seen, groups) == ([0, 1, 2], 1)


def test_bf16_trains():
    shape = {"num_layers": 4, "vocab_size": VOCABULARY}
    bf16 = tiny(model=shape, training={"precision": "bf16"}, parallel={"distributed_optimizer": True})
    fp32 = tiny(model=shape, training={"precision": "fp32"})
    _, _, weights = run_ranks(1, train, fp32, VOCABULARY, 0)[0]
    exact = run_ranks(1, train, fp32, VOCABULARY, STEPS, weights)[0]
    for losses, norms, _ in run_ranks(2, train, bf16, VOCABULARY, STEPS, weights):
        torch.testing.assert_close(losses, exact[0], rtol=0, atol=0.05)
        torch.testing.assert_close(norms, exact[1], rtol=0.1, atol=0)
