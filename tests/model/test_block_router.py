"""Models with an index that chooses blocks: every layout, exchange and recomputation gives loss and gradients of one
rank, the index's too."""

from __future__ import annotations

import pytest
import torch
from distributed import run_ranks
from model_examples import load_full_weights, loss_of_batch, tiny, train

VOCABULARY = 62
PACKS = [[0, 30, 31, 64], [0, 64], [0, 5, 9, 40, 63, 64], [0, 33, 64]]
SHARED = {"router": "index", "router_dim": 6}
FINEST = {"router": "index", "router_dim": 8, "router_heads": "query", "router_keys": "key", "router_norm": "none"}
BY_KEY = {**SHARED, "router_keys": "key", "key_convolution": 3}


def config(attention=None, training=None, model=None, **sections):
    shape = {"num_layers": 4, "vocab_size": VOCABULARY, "qk_layernorm": True, **(model or {})}
    same = {"steps": 3, "global_batch_size": 4, "precision": "fp32", "loss_chunk_size": 24, **(training or {})}
    own = {"block_size": 4, "top_k": 4, "last_n_full": 1, **(attention or {})}
    return tiny(attention=own, training=same, model=shape, **sections)


def gradients_of(settings, weights, packs):
    """Loss, sums of the index by layer, and by name in the whole model each gradient of this rank with its place."""
    from megatron.core import parallel_state

    from moba_megatron import platform
    from moba_megatron.model.block_router import read_index_tallies
    from moba_megatron.model.builder import build_model
    from moba_megatron.model.exchange_choice import resolve_exchange
    from moba_megatron.model.schedule import AttentionSchedule
    from moba_megatron.training.optimizer import build_optimizer, wrap_data_parallel

    platform.start_model_parallel(settings.parallel, resolve_exchange(settings).levels)
    schedule = AttentionSchedule.from_config(settings.attention, settings.model.num_layers)
    chunks = build_model(settings, VOCABULARY, schedule)
    if weights is not None:
        load_full_weights(chunks, weights, settings)
    wrapped = wrap_data_parallel(chunks, settings)
    build_optimizer(wrapped, settings)
    for model in wrapped:
        model.zero_grad_buffer()
    loss = loss_of_batch(settings, wrapped, 0, packs)
    found, ranks = {}, (parallel_state.get_tensor_model_parallel_rank(), settings.parallel.tensor)
    for chunk in chunks:
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                local, rest = name.removeprefix("decoder.layers.").split(".", 1)
                name = f"decoder.layers.{numbers[int(local)]}.{rest}"
            if not parameter.requires_grad:
                continue
            found[name] = parameter.main_grad.clone(), getattr(parameter, "partition_dim", None), *ranks
    tallies = read_index_tallies(chunks, settings.model.num_layers, torch.device("cpu"))
    parallel_state.destroy_model_parallel()
    return loss, tallies, found


def gradients_of_each(configs, weights, packs):
    return [gradients_of(settings, weights, packs) for settings in configs]


def disagreements(found, expected) -> list[str]:
    """Loss to 1e-6, gradients to 1e-5 of their largest number, metrics to 1e-6."""
    (loss, tallies, gradients), (want, sums, whole) = found, expected
    problems = [] if abs(loss - want) <= 1e-6 * want else [f"loss {loss} for {want}"]
    if not torch.allclose(tallies, sums, rtol=1e-5, atol=1e-9):
        problems.append(f"sums {tallies} for {sums}")
    for name, (gradient, dim, rank, ranks) in gradients.items():
        if ".experts." in name:  # named by their rank
            continue
        part = whole[name][0]
        if part.shape != gradient.shape:
            halves = part.chunk(2, dim) if "linear_fc1" in name else [part]
            part = torch.cat([half.chunk(ranks, dim)[rank] for half in halves], dim)
        off = float((gradient - part).abs().max() / whole[name][0].abs().max().clamp(min=1e-12))
        if off > 1e-5:
            problems.append(f"{name}: gradient off by {off:.1e}")
    return problems


INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
SEQUENCE = {"tensor": 2, "sequence": True}
OVERLAPPED = {"overlap_grad_reduce": True}
KINDS = {"shared": SHARED, "finest": FINEST, "by_key": BY_KEY}
# One layout each for what a layer can meet; a few of them computed again.
LAYOUTS = [
    ({"tensor": 2}, "none"),
    ({"tensor": 2}, "selective"),
    (SEQUENCE, "none"),
    (SEQUENCE, "full"),
    ({"pipeline": 2}, "none"),
    (INTERLEAVED, "selective"),
    ({**INTERLEAVED, **OVERLAPPED}, "full"),
    (OVERLAPPED, ["mlp"]),
]


@pytest.fixture(scope="module", params=["shared", pytest.param("finest", marks=pytest.mark.slow), "by_key"])
def one_rank(request):
    """(settings of the index, weights of the whole model, what one rank finds)."""
    kind = KINDS[request.param]
    weights = run_ranks(1, train, config(kind), VOCABULARY, 0)[0][2]
    found = run_ranks(1, gradients_of, config(kind), weights, PACKS)[0]
    assert float(found[1][:3, 0].min()) > 0 and not found[1][3].any()
    assert all(float(g.abs().max()) > 0 for name, (g, *_) in found[2].items() if "block_router" in name)
    return kind, weights, found


def assert_layouts_agree(ranks: int, cases: list[tuple[dict, object]], one_rank) -> None:
    kind, weights, expected = one_rank
    configs = [config(kind, {"recompute": recompute}, parallel=parallel) for parallel, recompute in cases]
    for results in run_ranks(ranks, gradients_of_each, configs, weights, PACKS):
        for case, found in zip(cases, results, strict=True):
            assert not (problems := disagreements(found, expected)), (case, problems)


@pytest.mark.parametrize("recompute", ["selective", "full", ["mlp"], ["core_attn"]], ids=str)
def test_recomputation_agrees(one_rank, recompute):
    assert_layouts_agree(1, [({}, recompute)], one_rank)


def test_layouts_agree(one_rank):
    assert_layouts_agree(2, LAYOUTS, one_rank)


def test_exchanges_agree(one_rank):
    recompute = {"p2p": "none", "all_gather": "selective", "a2a": "full", "dispatch": "none"}
    cases = [({"context": 2, "exchange": name}, how) for name, how in recompute.items()]
    assert_layouts_agree(2, cases, one_rank)


@pytest.mark.parametrize("one_rank", ["shared"], indirect=True)
def test_products_of_layouts_agree(one_rank):
    both = {"context": 2, **SEQUENCE}
    cases = [
        (both, "full"),
        ({"context": 2, **INTERLEAVED, **OVERLAPPED}, "selective"),
        ({**SEQUENCE, "pipeline": 2}, "none"),
    ]
    assert_layouts_agree(4, [*cases, ({"context": 4, "exchange": "a2a+p2p"}, "none")], one_rank)


def agree(cases, kind, weights, packs, **sections) -> None:
    """Each case, (ranks, parallel), gives what one rank does."""
    expected = run_ranks(1, gradients_of, config(kind, **sections), weights, packs)[0]
    assert float(expected[1][:3, 0].min()) > 0
    for ranks, parallel in cases:
        for found in run_ranks(ranks, gradients_of, config(kind, **sections, parallel=parallel), weights, packs):
            assert not (problems := disagreements(found, expected)), (parallel, problems)


def test_sequences_without_documents_agree():
    """They bring their loss mask without boundaries."""
    weights = run_ranks(1, train, config(SHARED), VOCABULARY, 0)[0][2]
    whole = {"data": {"cross_document_attention": True}}
    agree([(2, SEQUENCE), (2, INTERLEAVED), (2, {"context": 2})], SHARED, weights, None, **whole)


def test_experts_agree():
    """With experts the schedule sets the scale of attached losses; without, nobody does."""
    experts = {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.01, "moe_ffn_hidden_size": 32}
    agree([(2, {"expert": 2}), (2, {})], SHARED, None, PACKS, model=experts)


def test_the_weight_of_the_loss_is_that_of_its_gradient():
    weights = run_ranks(1, train, config(SHARED), VOCABULARY, 0)[0][2]
    one, three = run_ranks(
        1, gradients_of_each, [config(SHARED), config({**SHARED, "router_loss_coeff": 3.0})], weights, PACKS
    )[0]
    assert one[0] == three[0] and torch.equal(one[1], three[1])
    for name, (gradient, *_) in one[2].items():
        wanted = 3 * gradient if "block_router" in name else gradient
        off = (three[2][name][0] - wanted).abs().max()
        assert off <= 1e-6 * wanted.abs().max(), name


def test_a_loss_without_its_mask_is_refused():
    from moba_megatron.model.index_inputs import IndexInputs

    q = torch.zeros(4, 1, 2, requires_grad=True)
    index = IndexInputs(q, q, None, "sparse", lambda output, learned: output)
    with pytest.raises(ValueError, match="learns from the tokens of the loss mask, but this batch brought none"):
        index.as_router()
    with torch.no_grad():
        assert index.as_router().loss == "none"


FROZEN = {"train_only": ["router"]}


def frozen_course(settings, weights):
    from megatron.core import parallel_state

    losses, norms, after = train(settings, VOCABULARY, 2, weights, PACKS)
    parallel_state.destroy_model_parallel()
    return losses, norms, {name: weight for name, weight in after.items() if "block_router" in name}, after


def frozen_courses(configs, weights):
    return [frozen_course(settings, weights)[:2] for settings in configs]


def test_a_frozen_rest_agrees_at_every_layout():
    """Stages without any weight that learns, too."""
    weights = run_ranks(1, train, config(SHARED), VOCABULARY, 0)[0][2]
    losses, norms, index, after = run_ranks(1, frozen_course, config(SHARED, FROZEN), weights)[0]
    assert index and all(torch.equal(after[name], weights[name]) != (name in index) for name in after)
    layouts = [
        ({"tensor": 2}, "full"), (SEQUENCE, "selective"), ({**INTERLEAVED, **OVERLAPPED}, "none"),
        ({"pipeline": 2, "pipeline_layers": [0, 4]}, "full"), ({"pipeline": 2, "pipeline_layers": [4, 0]}, "none"),
        ({"distributed_optimizer": True, **OVERLAPPED}, "full"),
    ]  # fmt: skip
    configs = [config(SHARED, {**FROZEN, "recompute": how}, parallel=parallel) for parallel, how in layouts]
    for courses in run_ranks(2, frozen_courses, configs, weights):
        for layout, (ours, our_norms) in zip(layouts, courses, strict=True):
            assert ours == pytest.approx(losses, rel=1e-5), layout
            assert our_norms == pytest.approx(norms, rel=1e-4), layout


def backward_products(settings, packs):
    """Gradients as `gradients_of` has them, and the operations of the matrix products of all backward passes."""
    from megatron.core.pipeline_parallel import schedules
    from torch.utils.flop_counter import FlopCounterMode

    backward, operations = schedules.backward_step, []

    def counted(*args, **named):
        with FlopCounterMode(display=False) as counter:
            gradient = backward(*args, **named)
        operations.append(counter.get_total_flops())
        return gradient

    schedules.backward_step = counted
    try:
        return gradients_of(settings, None, packs), sum(operations)
    finally:
        schedules.backward_step = backward


def products_of_each(configs, packs):
    return [backward_products(settings, packs) for settings in configs]


def test_a_frozen_rest_has_no_backward_pass():
    """The index gets the gradients it gets beside a model that learns, bit for bit. Products of a layer with an
    index: the input of the output projection, and the index's weights."""
    experts = {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.01, "moe_ffn_hidden_size": 32}
    for model in ({}, experts):
        both = [config(SHARED, training, model) for training in ({}, FROZEN)]
        (whole, whole_operations), (index, operations) = run_ranks(1, products_of_each, both, PACKS)[0]
        assert index[0] == whole[0] and torch.equal(index[1], whole[1]) and len(index[2]) == 3 * 4
        assert all(torch.equal(gradient, whole[2][name][0]) for name, (gradient, *_) in index[2].items())
        shape = both[1].model
        heads = shape.num_attention_heads * shape.head_size
        learns = 6 * (shape.query_groups + 1)
        a_token = 3 * 2 * shape.hidden_size * (heads + learns)
        assert operations == a_token * sum(pack[-1] for pack in PACKS) < 0.2 * whole_operations


FULL_FIRST = {**SHARED, "stages": [{"until": 0.5, "kind": "full"}, {"until": 1.0}]}
UNTAUGHT = {**SHARED, "router_loss": "none"}


def test_a_stage_without_a_choice_gives_the_index_zero_gradients():
    """The overlapped reduction waits for every weight. An index without a loss has none at all."""
    for kind, count in ((FULL_FIRST, 12), (UNTAUGHT, 0)):
        settings = [config(kind, {"recompute": how}, parallel=dict(OVERLAPPED)) for how in ("none", "full")]
        for found in run_ranks(2, gradients_of_each, settings, None, PACKS):
            for _, tallies, gradients in found:
                index = [gradient for name, (gradient, *_) in gradients.items() if "block_router" in name]
                assert len(index) == count and not any(gradient.any() for gradient in index) and not tallies.any()


def test_the_dense_loss_agrees():
    dense = {**SHARED, "router_loss": "dense"}
    weights = run_ranks(1, train, config(dense), VOCABULARY, 0)[0][2]
    a2a = {"context": 2, "exchange": "a2a"}
    agree([(1, {}), (2, SEQUENCE), (2, INTERLEAVED), (2, a2a)], dense, weights, PACKS, training={"recompute": "full"})
