"""Mixtures of experts in a configuration: what goes together, and an error with key, value and fix for what does
not."""

from __future__ import annotations

import pytest
from test_config import changed

from moba_megatron.config import ConfigError, check_world, config_from_dict, load_config

EXPERTS = {"model__num_moe_experts": 8, "model__moe_aux_loss_coeff": 0.01}


def mixture(**changes):
    return config_from_dict(changed(**{**EXPERTS, **changes}))


def problems(**changes) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        mixture(**changes)
    return raised.value.problems


def test_layers_of_experts():
    assert mixture().model.expert_layers == [True] * 4
    assert mixture(model__moe_layer_freq=3).model.expert_layers == [True, False, False, True]
    assert mixture(model__moe_layer_freq=[0, 1, 1, 0]).model.expert_layers == [False, True, True, False]
    assert config_from_dict(changed()).model.expert_layers == [False] * 4


def test_a_written_mixture_reads_back_equal(tmp_path):
    config = mixture(model__moe_layer_freq=[0, 1, 1, 1], parallel__expert=2, model__moe_router_dtype="fp32")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config
    changes = ["model.moe_layer_freq=2", "parallel.expert_dispatcher=allgather"]
    again = load_config(tmp_path / "config.yaml", changes)
    assert (again.model.moe_layer_freq, again.parallel.expert_dispatcher) == (2, "allgather")
    assert load_config(tmp_path / "config.yaml", ["model.moe_layer_freq=[1,0,1,0]"]).model.moe_layer_freq == [
        1,
        0,
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__moe_layer_freq": [0, 1]}, "has 2 entries, but model.num_layers = 4"),
        ({"model__moe_layer_freq": [0, 0, 0, 0]}, "gives no layer experts"),
        ({"model__moe_shared_expert_gate": True}, "needs model.moe_shared_expert_intermediate_size"),
        ({"model__moe_router_topk": 9}, "model.moe_router_topk = 9 is over model.num_moe_experts = 8"),
        ({"model__moe_router_topk": 1}, "set model.moe_router_pre_softmax: true"),
        ({"model__moe_router_num_groups": 2}, "set both or none"),
        (
            {"model__moe_router_num_groups": 3, "model__moe_router_group_topk": 1},
            "model.moe_router_num_groups = 3 does not divide model.num_moe_experts = 8: use 2, 4 or 8",
        ),
        (
            {"model__moe_router_num_groups": 4, "model__moe_router_group_topk": 3},
            "of 4 groups of 2 experts a token chooses model.moe_router_topk = 2, the same number from each: use 1 or 2",
        ),
        ({"model__moe_router_enable_expert_bias": True}, "needs model.moe_router_score_function: sigmoid"),
        ({"model__moe_router_load_balancing_type": "none"}, "model.moe_aux_loss_coeff = 0.01 has no effect with"),
        ({"model__moe_pad_expert_input_to_capacity": True}, "needs model.moe_expert_capacity_factor"),
        ({"model__moe_expert_capacity_factor": 1.5, "parallel__context": 2}, "padding would displace tokens"),
        ({"parallel__expert": 3}, "does not divide model.num_moe_experts = 8: use 1, 2, 4 or 8, or 6 or 9 experts"),
        ({"model__moe_ffn_hidden_size": 30, "parallel__expert_tensor": 4}, "does not divide model.moe_ffn_hidden_size"),
        ({"parallel__tensor": 2}, "with experts needs parallel.sequence: true"),
        (
            {"parallel__expert_dispatcher": "allgather", "parallel__context": 2},
            "unequal numbers of tokens; use alltoall",
        ),
    ],
)
def test_what_cannot_work_is_said_with_the_fix(changes, said):
    assert any(said in line for line in problems(**changes)), problems(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"model__moe_router_topk": 4}, {"model__moe_z_loss_coeff": 0.1}, {"parallel__expert": 2},
     {"parallel__expert_dispatcher": "allgather"}],
)  # fmt: skip
def test_settings_of_experts_need_experts(changes):
    with pytest.raises(ConfigError, match=r"needs model\.num_moe_experts: set it, or take this out"):
        config_from_dict(changed(**changes))


def test_experts_and_processes():
    """Experts lie over the ranks of a pipeline stage, whatever these have in common besides."""
    assert check_world(mixture(parallel__expert=2), 2) == 2
    assert check_world(mixture(parallel__expert=2, parallel__tensor=2, parallel__sequence=True), 2) == 1
    assert check_world(mixture(parallel__expert=2, parallel__context=2), 2) == 1
    assert check_world(mixture(parallel__expert=4, parallel__pipeline=2), 8) == 4
    with pytest.raises(ConfigError, match=r"= 4 does not divide the 6 processes: start 4 or 8"):
        check_world(mixture(parallel__expert=4), 6)
    with pytest.raises(ConfigError, match=r"= 3 does not divide the 8 processes: start 6 or 12"):
        check_world(mixture(model__num_moe_experts=6, parallel__expert=2, parallel__context=3), 8)


@pytest.mark.parametrize(
    ("recompute", "model", "said"),
    [
        ([], {}, "repeats nothing"),
        (["moe", "moe"], {}, "names one twice"),
        (["mlp"], {}, "no layer is a dense one"),
        (["moe"], {"model__num_moe_experts": None, "model__moe_aux_loss_coeff": 0.0}, "no layer has experts"),
        (["shared_experts"], {}, "without model.moe_shared_expert_intermediate_size"),
        (
            ["moe", "shared_experts"],
            {"model__moe_shared_expert_intermediate_size": 8},
            "moe repeats the shared experts too",
        ),
        ("half", {}, "training.recompute = 'half': use none, selective, full or a list of core_attn, mlp, moe"),
        (["norm"], {}, "training.recompute = ['norm']: use none, selective, full or a list of core_attn"),
        (["layernorm", "moe"], {}, "layernorm needs norms that are not fused into the next product: use none"),
        ([["mlp"]], {}, "training.recompute = [['mlp']]: use none, selective, full or a list of core_attn"),
        (["mla_up_proj"], {}, "mla_up_proj belongs to multi-latent attention: use none"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(recompute, model, said):
    found = problems(training__recompute=recompute, **model)
    assert len(found) == 1 and said in found[0]
