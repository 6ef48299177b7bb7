"""Plans of mixtures of experts against the model that is built, and by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from distributed import run_ranks
from model_examples import tiny
from planning.expert_examples import QWEN, VOCABULARY, WITHOUT_SHARED, built, mixture, schedule_of
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from moba_megatron.cli import app
from moba_megatron.config import check_world, load_config
from moba_megatron.config.checks import combination_problems
from moba_megatron.config.sizes import expert_parameters, idle_parameters, matrix_parameters, router_parameters
from moba_megatron.model.builder import count_parameters
from moba_megatron.model.exchange_choice import resolve_exchange
from moba_megatron.model.schedule import FULL
from moba_megatron.planning.expert_shape import ExpertShape
from moba_megatron.planning.expert_traffic import expert_traffic, sorted_bytes
from moba_megatron.planning.flops import training_flops_per_token
from moba_megatron.planning.memory import estimate_memory
from moba_megatron.planning.plan_layouts import suggest_layouts
from moba_megatron.planning.plan_machines import GPUS, Cluster
from moba_megatron.planning.plan_stages import expert_replicas, stages_of, whole_parameters
from moba_megatron.planning.plan_time import layer_seconds, step_time
from moba_megatron.training.dry_run import print_dry_run

LAYOUTS = [
    {},
    {"expert": 2},
    {"tensor": 2, "sequence": True, "expert": 4},
    {"expert_tensor": 2, "expert_dispatcher": "allgather", "expert": 2},
    {"pipeline": 2, "pipeline_layers": [1, 3], "expert": 2},
    {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2, "sequence": True, "expert": 2},
]


def test_parameters_of_every_rank_are_those_of_the_model():
    configs = [mixture(layout) for layout in LAYOUTS]

    def sizes() -> list[tuple[int, int, int]]:
        from megatron.core import parallel_state

        found = []
        for config in configs:
            named = [pair for chunk in built(config) for pair in chunk.named_parameters()]
            experts = sum(parameter.numel() for name, parameter in named if ".experts." in name)
            stage = parallel_state.get_pipeline_model_parallel_rank()
            found.append((stage, sum(parameter.numel() for _, parameter in named), experts))
            replicas = parallel_state.get_expert_data_parallel_world_size()
            assert replicas == expert_replicas(config, check_world(config, 4))
            parallel_state.destroy_model_parallel()
        return found

    for ranks in run_ranks(4, sizes):
        for config, (number, parameters, experts) in zip(configs, ranks, strict=True):
            stage = stages_of(config, VOCABULARY, 1)[number]
            assert (parameters, experts) == (stage.parameters, stage.experts), config.parallel


@pytest.mark.parametrize("shape", [{}, WITHOUT_SHARED, {"moe_layer_freq": 2}])
def test_parameters_of_a_token_are_those_of_a_model_with_as_many_experts(shape):
    config, fewer = mixture(**shape), mixture(**shape, num_moe_experts=2)
    whole = count_parameters(config).total
    assert whole_parameters(config, VOCABULARY) == whole
    rows_of_routers = sum(config.model.expert_layers) * 2 * config.model.hidden_size
    assert whole - idle_parameters(config.model) == count_parameters(fewer).total + rows_of_routers
    dense = tiny().model
    assert idle_parameters(dense) == 0 and not any(dense.expert_layers)


def test_qwen3_30b_a3b_has_the_parameters_of_its_name():
    model = load_config(QWEN).model
    whole = whole_parameters(load_config(QWEN), model.vocab_size)
    assert whole == 30_532_122_624 and whole - idle_parameters(model) == 3_353_032_704


def test_operations_of_a_layer_are_those_that_run():
    config = mixture()

    def operations() -> int:
        layer = built(config)[0].decoder.layers[1].mlp
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(64, 1, config.model.hidden_size))
        return counter.get_total_flops()

    model = config.model
    shared = 3 * model.hidden_size * 16
    active = router_parameters(model) + shared + 2 * expert_parameters(model)
    assert run_ranks(1, operations) == [2 * 64 * active]
    attention = 32 * 8 * (4 + 2 * 2) + 4 * 8 * 32
    matrices = 4 * attention + 3 * 32 * 48 + 3 * active + 32 * VOCABULARY
    assert matrix_parameters(model, VOCABULARY) == matrices
    full = training_flops_per_token(config, VOCABULARY, [None] * 4)
    assert full == 6 * matrices + 12 * 8 * 4 * 4 * (64 + 1) / 2


@pytest.mark.parametrize(
    ("factor", "padded", "sent"), [(None, False, 128), (0.5, False, 64), (2.0, False, 128), (2.0, True, 256)]
)
def test_rows_that_a_capacity_leaves(factor, padded, sent):
    config = mixture(moe_expert_capacity_factor=factor, moe_pad_expert_input_to_capacity=padded)
    config = config.model_copy(update={"data": config.data.model_copy(update={"cross_document_attention": True})})
    shape = ExpertShape.of(config)
    assert (shape.tokens, shape.sent, shape.rows) == (64, sent, sent)


def test_what_expert_parallelism_divides():
    def memory(data_parallel: int, parallel: dict[str, Any], **model: Any):
        (estimate,) = estimate_memory(
            mixture(parallel, **model), schedule_of(mixture()), VOCABULARY, data_parallel, "cpu"
        )
        return estimate

    experts = 3 * 4 * 3 * 32 * 24
    one, two = memory(1, {}), memory(2, {"expert": 2})
    assert one.weights - two.weights == 4 * experts // 2 and one.optimizer - two.optimizer == 8 * experts // 2
    # Four data-parallel ranks hold all dense weights, two of them the same experts.
    split = memory(4, {"expert": 2, "distributed_optimizer": True})
    dense = one.weights // 4 - experts
    assert split.optimizer == 8 * dense // 4 + 8 * (experts // 2) // 2
    assert two.activations == one.activations
    # Each rank computes as many rows; with half the layers as mixtures there are fewer.
    assert memory(1, {}, moe_layer_freq=[0, 1, 0, 1]).activations < one.activations
    assert memory(1, {}, moe_router_topk=1, moe_router_pre_softmax=True).activations < one.activations


def test_time_is_that_of_the_rows():
    training = {"global_batch_size": 64, "precision": "bf16"}
    two, one = (mixture({"expert": 2}, training, moe_layer_freq=freq) for freq in ([0, 0, 1, 1], [0, 0, 0, 1]))
    cluster = Cluster(GPUS["h100"], 2)
    times = [step_time(c, schedule_of(c).stages[0], VOCABULARY, 2, cluster) for c in (two, one)]
    for name in ("sorting tokens by expert", "expert parallelism"):
        assert times[0].parts[name] == pytest.approx(2 * times[1].parts[name]) and times[0].parts[name] > 0
    assert times[0].received["experts"] == 32 * 2 * expert_traffic(two, cluster).bytes
    # A copy is read and written: two there, two back, and again backward, of 128 rows of 32 channels in bf16.
    assert sorted_bytes(two) == 2 * 4 * 2 * 128 * 32 * 2
    # Products of a mixture: attention, router, gate and shared expert of all tokens, and two experts of each.
    attention, router, shared, experts = 32 * 8 * 8 + 32 * 32, 32 * (4 + 1), 3 * 32 * 16, 2 * 3 * 32 * 24
    whole = 2 * 32 + attention + router + shared
    seconds = layer_seconds(two, FULL, cluster, resolve_exchange(two), experts=True).matrices
    assert seconds == pytest.approx(6 * 64 * (whole / 0.6 + experts / 0.45) / 989e12)


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, ["plan", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_layouts_of_a_mixture_pass_the_checks_of_a_run():
    config = load_config(QWEN, ["model.num_layers=12", "parallel.context=4"])
    cluster = Cluster(GPUS["h100"], 16)
    layouts = suggest_layouts(config, schedule_of(config), config.model.vocab_size, cluster, 1000)
    assert len({layout.parallel.expert for layout in layouts}) > 2
    for layout in layouts:
        trial = config.model_copy(update={"parallel": layout.parallel})
        assert not combination_problems(trial) and check_world(trial, 16) == layout.data
        assert f"parallel.expert={layout.parallel.expert}" in layout.overrides


def test_the_command_names_total_and_active_parameters(tmp_path, capsys):
    small = ["model.num_layers=8", "parallel.context=4"]
    output = call(QWEN, *small, "--gpus", 16, "--layouts", 1, "--json", tmp_path / "plan.json")
    for words in ("active for a token", "EP 8, 2 copies, alltoall", "sorting tokens by expert", "expert parallelism"):
        assert words in output
    written = json.loads((tmp_path / "plan.json").read_text())
    plan, first = written["plan"], written["layouts"][0]
    assert plan["parameters"] > 4 * plan["active_parameters"]
    again = call(QWEN, *small, *first["overrides"], "--gpus", 16, "--layouts", 0, "--json", tmp_path / "again.json")
    assert "layouts that fit" not in again
    assert json.loads((tmp_path / "again.json").read_text())["plan"]["step_seconds"] == pytest.approx(
        first["step_seconds"]
    )
    print_dry_run(load_config(QWEN, small), 16)
    output = capsys.readouterr().out
    for words in ("active for a token", "memory per rank", "training FLOPs a token", "GPU hours"):
        assert words in output
