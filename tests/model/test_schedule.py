"""The attention schedule: rules of precedence, cutting of stages, storage, comparison."""

import json

import pytest

from moba_megatron.config import AttentionConfig
from moba_megatron.model.schedule import FULL, AttentionSchedule, LayerAttention

MOBA = LayerAttention("moba", 64, 2)


def schedule(num_layers: int = 6, **settings) -> AttentionSchedule:
    return AttentionSchedule.from_config(
        AttentionConfig.model_validate({"block_size": 64, "top_k": 2, **settings}), num_layers
    )


def full_layers(layers: tuple[LayerAttention, ...]) -> list[int]:
    return [number for number, layer in enumerate(layers, start=1) if layer.kind == "full"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"kind": "full"}, [1, 2, 3, 4, 5, 6]),
        ({"last_n_full": 2}, [5, 6]),
        ({"full_every_n": 3}, [3, 6]),
        ({"full_layers": [1, 4]}, [1, 4]),
        ({"full_layers": [1], "full_every_n": 4, "last_n_full": 1}, [1, 4, 6]),
        ({"last_n_full": 2, "layers": {6: {"kind": "moba"}, 2: {"kind": "full"}}}, [2, 5]),
        ({"kind": "full", "layers": {3: {"kind": "moba"}}}, [1, 2, 4, 5, 6]),
    ],
)
def test_which_layers_are_full(settings, expected):
    (layers,) = schedule(**settings).stages
    assert full_layers(layers) == expected
    assert all(layer == MOBA for layer in layers if layer.kind == "moba")


def test_layer_override_of_sizes_only_keeps_the_kind():
    (layers,) = schedule(last_n_full=1, layers={2: {"block_size": 16}, 3: {"top_k": 5}}).stages
    assert layers == (MOBA, LayerAttention("moba", 16, 2), LayerAttention("moba", 64, 5), MOBA, MOBA, FULL)


def test_a_stage_that_sets_the_kind_overrides_the_kinds_of_the_sections_layers():
    """Sizes of the section's layers stay; layers named in the stage itself keep the last word."""
    layers = {2: {"kind": "moba", "top_k": 3}, 3: {"kind": "full"}}
    stages = [
        {"until": 0.2},
        {"until": 0.4, "kind": "moba"},
        {"until": 0.6, "top_k": 5},
        {"until": 0.8, "kind": "full", "layers": {1: {"kind": "moba"}}},
        {"until": 1.0, "kind": "full"},
    ]
    first, moba, sizes, own, full = schedule(3, layers=layers, stages=stages).stages
    wide = LayerAttention("moba", 64, 3)
    assert first == (MOBA, wide, FULL)
    assert moba == (MOBA, wide, MOBA)
    assert sizes == (LayerAttention("moba", 64, 5), wide, FULL)
    assert own == (MOBA, FULL, FULL)
    assert full == (FULL, FULL, FULL)


def test_sizes_of_a_layer_that_is_never_moba_are_refused():
    for layer in ({"top_k": 4}, {"block_size": 16}):
        with pytest.raises(ValueError, match=f"gives layer 6 {next(iter(layer))}, but it is full in every stage: give"):
            schedule(last_n_full=1, layers={6: layer})
    with pytest.raises(ValueError, match="gives layer 2 top_k, but it is full"):
        schedule(stages=[{"until": 1.0, "kind": "full", "layers": {2: {"top_k": 4}}}])
    staged = schedule(
        last_n_full=1, layers={6: {"top_k": 4}}, stages=[{"until": 0.5, "last_n_full": 0}, {"until": 1.0}]
    )
    assert [layers[5] for layers in staged.stages] == [LayerAttention("moba", 64, 4), FULL]


def test_stages_fall_back_to_the_section():
    stages = [
        {"until": 0.5, "block_size": 32, "last_n_full": 0},
        {"until": 0.9, "top_k": 3},
        {"until": 1.0, "kind": "full"},
    ]
    first, second, third = schedule(last_n_full=1, stages=stages).stages
    assert first == (LayerAttention("moba", 32, 2),) * 6
    assert second == (LayerAttention("moba", 64, 3),) * 5 + (FULL,)
    assert third == (FULL,) * 6


def test_stage_cut_rounds_to_the_nearest_step_halves_upward():
    two = schedule(stages=[{"until": 0.9}, {"until": 1.0, "kind": "full"}])
    assert [two.stage_at(step, 100) for step in (1, 90, 91, 100)] == [0, 0, 1, 1]
    assert [two.last_step(0, steps) for steps in (4, 5, 6, 14, 16)] == [4, 5, 5, 13, 14]  # 3.6, 4.5, 5.4, 12.6, 14.4
    # In binary fractions these products fall just short of 14.5, 28.5 and 57.5.
    for until, steps, last in ((0.29, 50, 15), (0.57, 50, 29), (0.575, 100, 58)):
        assert schedule(stages=[{"until": until}, {"until": 1.0}]).last_step(0, steps) == last
    assert [two.stage_at(step, 4) for step in (1, 4)] == [0, 0]  # 10% of 4 steps is less than half a step
    for wrong in (0, 101):
        with pytest.raises(ValueError, match=f"step {wrong} is not one of 1 to 100"):
            two.stage_at(wrong, 100)


def test_every_step_has_exactly_one_stage_in_order():
    three = schedule(stages=[{"until": 1 / 3}, {"until": 2 / 3, "top_k": 4}, {"until": 1.0, "kind": "full"}])
    for steps in range(2, 40):
        stages = [three.stage_at(step, steps) for step in range(1, steps + 1)]
        assert stages == sorted(stages)
        assert stages[-1] == 2
        assert all(abs(stages.count(stage) - steps / 3) <= 1 for stage in range(3))


def test_round_trip_through_json():
    original = schedule(last_n_full=2, stages=[{"until": 0.9}, {"until": 1.0, "kind": "full"}])
    assert AttentionSchedule.from_dict(json.loads(json.dumps(original.to_dict()))) == original
    with pytest.raises(ValueError, match="not a stored attention schedule"):
        AttentionSchedule.from_dict({"stages": [[["moba", 64, 2]]]})


def test_differences_name_stage_and_layer():
    ours, theirs = schedule(last_n_full=1), schedule(layers={2: {"top_k": 4}})
    assert ours.differences(ours) == []
    assert ours.differences(theirs) == [
        "stage 1, layer 2: moba B=64 K=2 against moba B=64 K=4",
        "stage 1, layer 6: full against moba B=64 K=2",
    ]
    assert ours.differences(schedule(num_layers=4)) == ["6 layers against 4"]
    staged = schedule(stages=[{"until": 0.9}, {"until": 1.0, "kind": "full"}])
    assert ours.differences(staged) == ["stages end at [1.0] of the training against [0.9, 1.0]"]


def test_sizes_of_full_layers_do_not_matter():
    assert schedule(kind="full", block_size=64) == schedule(kind="full", block_size=128, top_k=7)


def test_table_is_readable():
    staged = schedule(last_n_full=1, stages=[{"until": 0.9}, {"until": 1.0, "kind": "full"}])
    assert staged.table(steps=50).splitlines() == [
        "stage 1/2 until 90% (steps 1-45)  layers 1-5: moba B=64 K=2, layer 6: full",
        "stage 2/2 until 100% (steps 46-50)  layers 1-6: full",
    ]


def test_always_full():
    staged = schedule(last_n_full=1, stages=[{"until": 0.9}, {"until": 1.0, "kind": "full"}])
    assert [staged.always_full(number) for number in (1, 5, 6)] == [False, False, True]


@pytest.mark.parametrize(
    "wrong", [("moba", None, 3), ("moba", 0, 3), ("moba", 64, 0), ("full", 64, None), ("sparse", 1, 1)]
)
def test_impossible_layers_are_refused(wrong):
    with pytest.raises(ValueError):
        LayerAttention(*wrong)


def test_unknown_layers_and_wrong_stages_are_refused():
    with pytest.raises(ValueError, match=r"layers \[7\]: layers are counted from 1 to 6"):
        schedule(full_layers=[7])
    with pytest.raises(ValueError, match="must rise"):
        AttentionSchedule(((MOBA,), (FULL,)), (0.9, 0.9))
    with pytest.raises(ValueError, match="one end for each stage"):
        AttentionSchedule(((MOBA,),), (0.9, 1.0))
    with pytest.raises(ValueError, match="different numbers of layers"):
        AttentionSchedule(((MOBA,), (FULL, FULL)), (0.9, 1.0))
