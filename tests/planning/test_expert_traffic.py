"""Bytes of experts in plans: against those that are received, and by hand."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from distributed import run_ranks
from model_examples import loss_of_batch
from planning.expert_examples import QWEN, VOCABULARY, WITHOUT_SHARED, built, mixture

from moba_megatron.config import load_config
from moba_megatron.planning.expert_shape import reached_share
from moba_megatron.planning.expert_traffic import expert_traffic
from moba_megatron.planning.plan_machines import GPUS, Cluster
from moba_megatron.planning.plan_stages import stages_of
from moba_megatron.planning.plan_traffic import data_moved, tensor_moved


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


def test_gradients_of_experts_go_to_the_ranks_that_have_them():
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
