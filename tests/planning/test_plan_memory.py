"""The memory that is predicted, against the peak of PyTorch's allocator in real training runs on this CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from small_run import small_config, train_here

from moba_megatron.benchmark.calls import peak_bytes
from moba_megatron.config import Config
from moba_megatron.model.builder import count_parameters
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.planning.memory import estimate_memory, fullest
from moba_megatron.planning.plan_stages import stages_of

VOCABULARY = 128
TOLERANCE = 0.15

# Activations outweigh all else here; three MoBA layers and a full one.
SIZES = {
    "model__num_layers": 4,
    "model__hidden_size": 256,
    "model__num_attention_heads": 4,
    "model__num_query_groups": 2,
    "model__ffn_hidden_size": 768,
    "attention__block_size": 128,
    "attention__top_k": 4,
    "data__sequence_length": 4096,
    "data__cross_document_attention": True,
    "training__micro_batch_size": 1,
    "training__global_batch_size": 1,
    "training__steps": 2,
    "optimizer__warmup_steps": 1,
    "evaluation__samples": 1,
}

# Routers that hardly learn, so that the load stays as they are drawn. With experts as wide as the model their rows
# weigh as much as all else.
MIXTURE = {
    "model__num_moe_experts": 8,
    "model__moe_ffn_hidden_size": 256,
    "model__moe_aux_loss_coeff": 0.01,
    "optimizer__lr": 1e-9,
    "optimizer__min_lr": 0.0,
}
SHARED = {"model__moe_shared_expert_intermediate_size": 256, "model__moe_shared_expert_gate": True}
TWO_RANKS = {"parallel__expert": 2, "training__global_batch_size": 2}
DATA_PARALLEL = {
    "parallel__distributed_optimizer": True,
    "training__precision": "bf16",
    "training__global_batch_size": 2,
}


def peak_of_training(config: Config, world_size: int) -> int:
    """Train as one rank, and return the most bytes that tensors held at once. Only in a process of its own: it changes
    torch.distributed."""
    dist.all_to_all_single = freed_here(dist.all_to_all_single)
    return peak_bytes(lambda: train_here(config, world_size), "cpu")


def freed_here(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that ends when gloo's thread has let go of its tensors: what that thread frees no profile sees."""

    def call(*args: Any, **more: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        before = [tensor._use_count() for tensor in tensors]
        result = collective(*args, **more)
        while [tensor._use_count() for tensor in tensors] > before:
            time.sleep(0.001)
        return result

    return call


def schedule_of(config: Config) -> AttentionSchedule:
    return AttentionSchedule.from_config(config.attention, config.model.num_layers)


def check(folder, world_size: int, **changes: Any) -> None:
    config = small_config(folder, **{**SIZES, **changes})
    parallel = config.parallel
    data_parallel = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    estimate = fullest(estimate_memory(config, schedule_of(config), VOCABULARY, data_parallel, "cpu"))
    measured = max(run_ranks(world_size, peak_of_training, config, world_size, timeout=280))
    print(f"{changes}: {estimate.total / 2**20:.0f} MiB expected, {measured / 2**20:.0f} MiB measured")
    assert estimate.total == pytest.approx(measured, rel=TOLERANCE), (estimate, measured)


def test_the_peak_of_a_short_run(tmp_path):
    check(tmp_path, 1, data__sequence_length=2048, training__recompute="full", model__num_layers=3)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_peak_of_a_short_run_with_experts(tmp_path, world_size):
    """A dense layer and a mixture, experts on one rank or on two."""
    changes = {**MIXTURE, **SHARED, "model__moe_layer_freq": [0, 1], **(TWO_RANKS if world_size == 2 else {})}
    check(tmp_path, world_size, data__sequence_length=2048, model__num_layers=2, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (1, {"training__recompute": "full"}),
        (1, {"training__recompute": ["moe"]}),
        (1, {**SHARED, "training__recompute": ["core_attn", "shared_experts"]}),
        (1, {**SHARED, "training__precision": "bf16", "model__moe_router_dtype": "fp32"}),
        (2, TWO_RANKS),
        (2, {**TWO_RANKS, "training__recompute": "full"}),
        (2, {**TWO_RANKS, "parallel__expert_dispatcher": "allgather"}),
        (2, {**TWO_RANKS, "training__precision": "bf16", "parallel__distributed_optimizer": True}),
        (2, {**SHARED, "parallel__expert": 2, "parallel__tensor": 2, "parallel__sequence": True}),
        (
            2,
            {
                **TWO_RANKS,
                "model__moe_expert_capacity_factor": 1.0,
                "model__moe_pad_expert_input_to_capacity": True,
            },
        ),
    ],
    ids=(
        "one one-full one-moe one-shared one-bf16-shared ep ep-full ep-allgather ep-bf16-dist-opt ep-tp-sp-shared "
        "ep-padded"
    ).split(),
)
def test_the_peak_with_experts(tmp_path, world_size, changes):
    check(tmp_path, world_size, **MIXTURE, **changes)


SAVINGS = [
    {"training__mlp_chunk_size": 512},
    {"training__mlp_chunk_size": 512, "training__recompute": "selective"},
    {"training__mlp_chunk_size": 512, "training__recompute": "full"},
    {"training__recompute": "full", "training__recompute_layers": 2},
]


FROZEN = {"attention__router": "index", "attention__router_dim": 64, "training__train_only": ["router"]}


def test_the_peak_of_a_short_run_of_the_index_alone(tmp_path):
    check(tmp_path, 1, data__sequence_length=2048, model__num_layers=2, attention__last_n_full=1, **FROZEN)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"training__recompute": "full"}, {"training__precision": "bf16"}, {"training__mlp_chunk_size": 512}],
    ids=["index", "index-full", "index-bf16", "index-chunks"],
)
def test_the_peak_of_the_index_alone(tmp_path, changes):
    check(tmp_path, 1, **FROZEN, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("changes", SAVINGS, ids=["chunks", "chunks-selective", "chunks-full", "full-of-2"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_peak_with_less_kept(tmp_path, world_size, changes):
    parallel = {"parallel__tensor": 2, "parallel__sequence": True} if world_size == 2 else {}
    check(tmp_path, world_size, **parallel, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full", ["mlp"], ["core_attn", "mlp"]], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_of_one_rank(tmp_path, precision, recompute):
    check(tmp_path, 1, training__precision=precision, training__recompute=recompute)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__tensor": 2},
        {"parallel__tensor": 2, "parallel__sequence": True},
        {"parallel__pipeline": 2, "training__global_batch_size": 3},
        {"parallel__pipeline": 2, "parallel__pipeline_layers": [3, 1], "training__global_batch_size": 2},
        {"parallel__context": 2},
        {"parallel__context": 2, "parallel__exchange": "p2p"},
        {"parallel__context": 2, "parallel__exchange": "all_gather"},
        {"parallel__context": 2, "parallel__exchange": "dispatch"},
        DATA_PARALLEL,
        {**DATA_PARALLEL, "training__gradient_precision": "bf16"},
        {
            "parallel__pipeline": 2,
            "parallel__virtual_pipeline": 2,
            "model__num_layers": 8,
            "training__global_batch_size": 4,
            "evaluation__samples": 2,
            "training__recompute": "full",
            "training__recompute_layers": 1,
        },
    ],
    ids=(
        "tp tp-sp pp pp-uneven cp-a2a cp-p2p cp-all_gather cp-dispatch dp-bf16 dp-bf16-gradients pp-interleaved"
    ).split(),
)
def test_the_peak_of_two_ranks(tmp_path, changes):
    check(tmp_path, 2, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__add_qkv_bias": True, "model__share_embeddings_and_output_weights": True},
        {"model__qk_layernorm": True, "model__kv_channels": 12},
        {"attention__key_convolution": 3},
    ],
)
def test_parameters_of_the_stages_are_those_of_the_model(tmp_path, changes):
    config = small_config(tmp_path, **changes)
    (stage,) = stages_of(config, 101, 1)
    assert stage.parameters == count_parameters(config, 101).total
    cut = small_config(tmp_path, **changes, parallel__pipeline=2, parallel__pipeline_layers=[1, 3])
    tied = config.model.share_embeddings_and_output_weights * 101 * config.model.hidden_size
    assert sum(stage.parameters for stage in stages_of(cut, 101, 4)) == stage.parameters + tied
    assert [stage.layers for stage in stages_of(cut, 101, 4)] == [(1,), (2, 3, 4)]


def test_microbatches_in_flight(tmp_path):
    four = small_config(tmp_path, parallel__pipeline=4)
    assert [stage.in_flight for stage in stages_of(four, 101, 8)] == [4, 3, 2, 1]
    assert [stage.in_flight for stage in stages_of(four, 101, 2)] == [2, 2, 2, 1]
    interleaved = small_config(tmp_path, parallel__pipeline=2, parallel__virtual_pipeline=2)
    # 5 and 3 chunks of one layer, on stages of two layers.
    assert [stage.in_flight for stage in stages_of(interleaved, 101, 8)] == [2.5, 1.5]
    assert [stage.layers for stage in stages_of(interleaved, 101, 8)] == [(1, 3), (2, 4)]


def test_what_each_form_of_parallelism_divides(tmp_path):
    def memory(data_parallel: int = 1, **changes: Any):
        config = small_config(tmp_path, training__precision="bf16", data__cross_document_attention=True, **changes)
        return fullest(estimate_memory(config, schedule_of(config), 102, data_parallel))

    one = memory()
    split = memory(4, parallel__distributed_optimizer=True)
    assert split.optimizer == one.optimizer // 4 and split.weights == one.weights
    assert one.gradients == 2 * one.weights and one.optimizer == 6 * one.weights
    assert memory(parallel__tensor=2).weights < 0.51 * one.weights
    context = memory(parallel__context=2)
    assert context.activations < 0.52 * one.activations and context.exchange > 0 and one.exchange == 0
    sequence = memory(parallel__tensor=2, parallel__sequence=True)
    assert sequence.activations < memory(parallel__tensor=2).activations
    half = memory(2, parallel__distributed_optimizer=True, training__gradient_precision="bf16")
    assert half.gradients == one.gradients // 2 == half.weights
    # A copy of them is summed when activations are gone; here these are large.
    assert half.total < one.total
    many = {"model__hidden_size": 1024, "model__ffn_hidden_size": 4096, "data__sequence_length": 16}
    short = memory(2, parallel__distributed_optimizer=True, training__gradient_precision="bf16", **many)
    assert short.working == 2 * short.weights // 2 - short.activations - short.moba
    assert memory(training__recompute="full").activations < 0.2 * one.activations
    assert memory(training__recompute="selective").moba == 0 < one.moba
    some = memory(training__recompute="full", training__recompute_layers=2).activations
    assert memory(training__recompute="full").activations < some < one.activations
    assert memory(training__mlp_chunk_size=16).activations == memory(training__recompute=["mlp"]).activations


def test_a_profile_sees_what_tensors_hold():
    """The instrument itself: a tensor of 8 MiB that lives while another one does, and one that does not."""

    def body() -> None:
        first = torch.zeros(2**21)
        second = torch.zeros(2**21)
        del first
        third = torch.zeros(2**20)
        del second, third

    assert peak_bytes(body, "cpu") == 2**24
