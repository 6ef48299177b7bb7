"""Plans of mixtures of experts against the model that is built, against bytes that are sent, and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from model_examples import loss_of_batch, tiny
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from moba_megatron import platform
from moba_megatron.cli import app
from moba_megatron.config import Config, check_world, load_config
from moba_megatron.config.checks import combination_problems
from moba_megatron.config.sizes import expert_parameters, idle_parameters, matrix_parameters, router_parameters
from moba_megatron.model.builder import build_model, count_parameters
from moba_megatron.model.exchange_choice import resolve_exchange
from moba_megatron.model.schedule import FULL, AttentionSchedule
from moba_megatron.planning.expert_shape import ExpertShape, reached_share
from moba_megatron.planning.expert_traffic import expert_traffic, sorted_bytes
from moba_megatron.planning.flops import training_flops_per_token
from moba_megatron.planning.memory import estimate_memory
from moba_megatron.planning.plan_layouts import suggest_layouts
from moba_megatron.planning.plan_machines import GPUS, Cluster
from moba_megatron.planning.plan_stages import expert_replicas, stages_of, whole_parameters
from moba_megatron.planning.plan_time import layer_seconds, step_time
from moba_megatron.planning.plan_traffic import data_moved, tensor_moved
from moba_megatron.training.dry_run import print_dry_run

QWEN = Path(__file__).parents[2] / "configs/continued_pretraining/qwen3_30b_a3b/128k_moba.yaml"
MIXTURE: dict[str, Any] = {
    "num_layers": 4,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_shared_expert_intermediate_size": 16,
    "moe_shared_expert_gate": True,
    "moe_aux_loss_coeff": 0.01,
}
WITHOUT_SHARED = {"moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False}
VOCABULARY = 62


def mixture(parallel: dict[str, Any] | None = None, training: dict[str, Any] | None = None, **model: Any) -> Config:
    return tiny(
        model={**MIXTURE, "vocab_size": VOCABULARY, **model},
        attention={"last_n_full": 1},
        parallel=parallel or {},
        training={"global_batch_size": 4, **(training or {})},
    )


def schedule_of(config: Config) -> AttentionSchedule:
    return AttentionSchedule.from_config(config.attention, config.model.num_layers)


def built(config: Config) -> list[torch.nn.Module]:
    """The model chunks of this rank."""
    platform.start_model_parallel(config.parallel, resolve_exchange(config).levels)
    return build_model(config, VOCABULARY, schedule_of(config))


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


def test_bytes_of_experts_are_those_that_are_received():
    """On two ranks. Padded to their capacity, experts get as many rows as planned, and of all tokens each rank has as
    many; without, as many as the router likes, so that both ranks together come near."""
    same = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    exact = [
        mixture({"expert": 2}, **same),
        mixture({"expert": 2}, {"recompute": "full"}, **same),
        mixture({"expert": 2, "expert_dispatcher": "allgather"}),
        mixture({"expert_tensor": 2, "expert_dispatcher": "allgather"}, **WITHOUT_SHARED),
    ]
    loose = mixture({"expert": 2})

    def received() -> list[int]:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import mappings

        from moba_megatron.training.optimizer import wrap_data_parallel

        total = 0

        def counted(collective, output_over_input):
            def call(output, given, *args, group, **more):
                nonlocal total
                ranks = dist.get_world_size(group)
                part = output if output_over_input else given
                total += part.nbytes * (ranks - 1) // ranks
                return collective(output, given, *args, group=group, **more)

            return call

        dist.all_to_all_single = counted(dist.all_to_all_single, True)
        mappings.dist_all_gather_func = counted(mappings.dist_all_gather_func, True)
        mappings.dist_reduce_scatter_func = counted(mappings.dist_reduce_scatter_func, False)
        found = []
        for config in [*exact, loose]:
            wrapped = wrap_data_parallel(built(config), config)
            total = 0
            loss_of_batch(config, wrapped, 0)
            found.append(total)
            parallel_state.destroy_model_parallel()
        return found

    ranks = run_ranks(2, received)
    cluster = Cluster(GPUS["h100"], 2)
    layers, microbatches = 3, 2
    for number, config in enumerate(exact):
        expected = expert_traffic(config, cluster).times(layers * microbatches)
        assert [rank[number] for rank in ranks] == [expected.bytes] * 2, config.parallel
        assert expected.far == 0
    expected = expert_traffic(loose, cluster).times(layers * microbatches)
    assert sum(rank[-1] for rank in ranks) / 2 == pytest.approx(expected.bytes, rel=0.1)


def test_bytes_by_hand():
    """1,024 tokens of 2,048 channels in bf16 on each of 16 ranks, two nodes; 8 of 128 experts a token."""
    overrides = ["data.sequence_length=1024", "training.global_batch_size=16", "parallel.context=1",
                 "parallel.expert=16", "attention.block_size=128", "attention.top_k=2",
                 "evaluation.trailing_tokens=16"]  # fmt: skip
    cluster = Cluster(GPUS["h100"], 16)

    def moved(*more: str):
        return expert_traffic(load_config(QWEN, [*overrides, *more]), cluster)

    # 8,192 rows leave, 15/16 of them for others: there and back with a weight of 4 bytes, and the same backward.
    rows, row = 8192 * 15 // 16, 2 * 2 * 2048 + 4
    alltoall = moved()
    assert alltoall.bytes == 2 * rows * row + 8 * 128 * 15
    assert alltoall.far == pytest.approx(8 / 15 * alltoall.bytes)
    # 7 others of the node, 8 of the other one; the slower link is waited for.
    assert alltoall.seconds == pytest.approx(2 * 8 / 15 * rows * row / (0.75 * 50e9))
    assert moved("training.recompute=full").bytes == 3 * rows * row + 2 * 8 * 128 * 15
    # All tokens go to all, 15 shards: states, fp32 sums of states, scores; choices forward.
    gathered = moved("parallel.expert_dispatcher=allgather")
    assert gathered.bytes == 1024 * 15 * (2 * (2048 * (2 + 4) + 128 * 4) + 128)
    # Of 16 ranks with 8 experts each a token reaches one with the chance 1 - C(120, 8) / C(128, 8) = 0.4123.
    assert reached_share(load_config(QWEN, overrides), 16) == pytest.approx(0.4123, abs=1e-4)
    flex = moved("parallel.expert_dispatcher=flex")
    token = 2 * 2 * 2048 + 8 * 8  # and on average 8 bytes a choice
    assert flex.far == pytest.approx(2 * 1024 * token * 0.9970, rel=1e-3)  # 1 - C(64, 8) / C(128, 8)
    assert flex.near == pytest.approx(2 * 1024 * token * 0.4123 * (7 + 8 * 7 / 8), rel=1e-3)
    assert flex.bytes < alltoall.bytes < gathered.bytes
    # Two ranks an expert, neighbours: eight groups; every row goes to the other one too, and its sums come back.
    split = moved("parallel.expert=8", "parallel.expert_tensor=2")
    assert split.bytes == 2 * 8192 * row * (7 / 8 + 1) + 8 * 128 * 15


def test_groups_of_experts_bound_how_far_a_token_goes():
    groups = {"moe_router_num_groups": 4, "moe_router_group_topk": 1}
    config = mixture(num_moe_experts=8, moe_router_topk=2, **groups)
    assert reached_share(config, 2) == 1 / 2 and reached_share(config, 4) == 1 / 4
    assert reached_share(config, 8) == 1 / 4  # a group is two experts, and both are chosen
    assert reached_share(mixture(num_moe_experts=8, moe_router_topk=2), 4) == pytest.approx(1 - 15 / 28)


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


def test_gradients_of_experts_go_to_the_ranks_that_have_them(tmp_path):
    config = mixture({"expert": 2}, {"global_batch_size": 16})
    (stage,) = stages_of(config, VOCABULARY, 4)
    cluster = Cluster(GPUS["h100"], 4)
    moved = data_moved(config, cluster, stage, 4, 0.0).bytes
    assert moved == 8 * (stage.parameters - stage.experts) * 3 / 4 + 8 * stage.experts / 2
    # Attention's half of a layer, and the feed-forward's of the dense layer; of all with shared experts.
    sequence = {"tensor": 2, "sequence": True}
    some, every = (
        tensor_moved(mixture(sequence, **shape), cluster, stages_of(mixture(sequence), VOCABULARY, 1)[0]).bytes
        for shape in (WITHOUT_SHARED, {})
    )
    share = 64 * 32 * 4 / 2
    assert every == (10 * 4 + 2 + 2) * share and some == (10 * (1 + 3 / 2) + 2 + 2) * share


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
