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
        if name == "output_layer.weight" and name not in whole:
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


@pytest.fixture(scope="module", params=list(KINDS))
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
