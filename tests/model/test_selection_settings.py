"""Variants of the selection as settings: from the configuration to each layer, at every size alike."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from distributed import run_ranks
from model_examples import tiny, train, train_each

from moba_megatron.config import ConfigError
from moba_megatron.config.attention import AttentionConfig, AttentionSelector
from moba_megatron.convert.families import moba_config
from moba_megatron.model.schedule import FULL, AttentionSchedule, LayerAttention, without_effect
from moba_megatron.model.specs import moba_layer_spec
from moba_megatron.ops.selection import SELECTORS, SUMMARIES, Selection

VOCABULARY, STEPS = 62, 2
WINDOW = LayerAttention("moba", 8, 2, Selection("recent"))


def schedule_of(num_layers: int = 3, **attention) -> AttentionSchedule:
    values = {"block_size": 8, "top_k": 2, **attention}
    return AttentionSchedule.from_config(AttentionConfig.model_validate(values), num_layers)


def config(parallel=None, **attention):
    return tiny(
        model={"num_layers": 2, "num_query_groups": 2, "vocab_size": VOCABULARY},
        attention={"block_size": 8, "top_k": 3, "last_n_full": 1, **attention},
        training={"steps": STEPS, "global_batch_size": 2, "precision": "fp32", "loss_chunk_size": 24},
        parallel=parallel or {},
    )


def test_words_of_the_configuration_are_those_of_the_operator():
    assert get_args(AttentionSelector) == SELECTORS
    assert get_args(AttentionConfig.model_fields["summary"].annotation) == tuple(SUMMARIES)


def test_settings_reach_the_layers_that_ask_for_them():
    plain = LayerAttention("moba", 8, 2)
    assert schedule_of(selector="recent", last_n_full=1).stages == ((WINDOW, WINDOW, FULL),)
    assert schedule_of(layers={2: {"selector": "recent"}}).stages == ((plain, WINDOW, plain),)
    stages = [{"until": 0.5}, {"until": 1.0, "selector": "recent"}]
    assert schedule_of(stages=stages).stages == ((plain,) * 3, (WINDOW,) * 3)
    mixed = schedule_of(selector="threshold", threshold=0.9, summary="min_max", layers={1: {"selector": "recent"}})
    assert [layer.selection for layer in mixed.stages[0]] == [
        Selection("recent"),
        *[Selection("threshold", "min_max", 0.9)] * 2,
    ]
    assert str(mixed.stages[0][1]) == "moba B=8 K=2 threshold of min_max 0.9"
    with pytest.raises(ValueError, match="layer 3 selector, but it is full"):
        schedule_of(last_n_full=1, layers={3: {"selector": "recent"}})


def test_a_layer_may_have_settings_of_its_own():
    layers = {
        1: {"top_k": [2, 4], "summary": "min_max"},
        2: {"selector": "threshold", "threshold": 0.5, "top_k": [3, 3]},
        3: {"top_k": 4},
    }
    schedule = schedule_of(layers=layers)
    assert schedule.stages[0] == (
        LayerAttention("moba", 8, 4, Selection(summary="min_max", budgets=(2, 4))),
        LayerAttention("moba", 8, 3, Selection("threshold", threshold=0.5)),
        LayerAttention("moba", 8, 4),
    )
    first = schedule.stages[0][0]
    assert (str(first), first.blocks, first.fewest_blocks, first.mean_blocks) == (
        "moba B=8 K=2,4 top_k of min_max", (2, 4), 2, 3.0,
    )  # fmt: skip
    assert first.of_heads(1, 1) == LayerAttention("moba", 8, 4, Selection(summary="min_max"))
    assert AttentionSchedule.from_dict(schedule.to_dict()) == schedule
    with pytest.raises(
        ValueError, match="layer 3 summary, threshold, but it is full in every stage: give it `kind: moba`, or"
    ):
        schedule_of(last_n_full=1, layers={3: {"summary": "min_max", "threshold": 0.5}})


def test_settings_of_the_section_that_no_layer_takes_are_found():
    def unused(**settings):
        attention = AttentionConfig(block_size=8, top_k=2, **settings)
        return without_effect(attention, AttentionSchedule.from_config(attention, 2))

    own = {n: {"selector": "threshold", "threshold": 0.5, "summary": "mean"} for n in (1, 2)}
    assert unused(selector="threshold", threshold=0.9, summary="min_max", layers=own) == [
        f"attention.{name} has no effect: no MoBA layer uses it; take it out"
        for name in ("summary = min_max", "threshold = 0.9")
    ]
    assert not unused(selector="threshold", threshold=0.9, summary="min_max", layers={1: own[1]})
    recent = {n: {"selector": "recent"} for n in (1, 2)}
    assert len(unused(share_selection="mean", layers=recent)) == 1
    assert not unused(summary="min_max", stages=[{"until": 0.5}, {"until": 1.0, "layers": recent}])
    assert not unused(summary="min_max", kind="full")


def test_a_schedule_is_stored_with_its_selections():
    for schedule in (schedule_of(), schedule_of(selector="threshold", threshold=0.5), schedule_of(selector="recent")):
        assert AttentionSchedule.from_dict(schedule.to_dict()) == schedule
    shared = schedule_of(3, share_selection="max", layers={2: {"selector": "recent"}})
    assert [layer.selection for layer in shared.stages[0]][:2] == [
        Selection(share_selection="max"),
        Selection("recent"),
    ]
    assert AttentionSchedule.from_dict(shared.to_dict()) == shared
    # Plain MoBA is stored as it was before there were variants.
    assert schedule_of(1).to_dict()["stages"] == [[["moba", 8, 2]]]
    assert schedule_of(selector="recent").differences(schedule_of()) == [
        f"stage 1, layer {n}: moba B=8 K=2 recent against moba B=8 K=2" for n in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("attention", "named"),
    [
        ({"selector": "threshold"}, "attention.threshold is not set"),
        ({"threshold": 0.9}, "attention.threshold = 0.9 has no effect with the selector top_k"),
        ({"selector": "recent", "summary": "min_max"}, "attention.summary = min_max has no effect"),
        ({"selector": "recent", "backend": "flash_moba"}, "flash_moba chooses blocks by top_k"),
        ({"summary": "min_max", "backend": "flash_moba"}, "not by top_k of min_max"),
        ({"selector": "threshold", "threshold": 2.0}, "attention.threshold = 2.0"),
        ({"share_selection": "mean", "selector": "recent"}, "attention.share_selection = mean has no effect with the"),
        ({"share_selection": "max", "backend": "flash_moba"}, r"share_selection: max\): use auto"),
        ({"selector": "nearest"}, "attention.selector = 'nearest'"),
        (
            {"layers": {1: {"top_k": [2, 3, 4]}}},
            r"attention.layers.1.top_k = \[2, 3, 4\] has 3 entries, but model.num_query_groups = 2: give one number",
        ),
        ({"layers": {1: {"top_k": [2, 0]}}}, r"attention.layers.1.top_k = \[2, 0\]: a number of blocks from 1 to"),
        ({"layers": {1: {"top_k": []}}}, r"attention.layers.1.top_k = \[\]: give one number for each key head"),
        ({"layers": {1: {"top_k": [2, 3]}}, "backend": "flash_moba"}, "flash_moba chooses blocks by top_k"),
        ({"layers": {1: {"summary": "min_max"}}, "backend": "flash_moba"}, "flash_moba chooses blocks by top_k"),
        ({"layers": {1: {"threshold": 0.5}}}, "attention.layers.1.threshold = 0.5 has no effect with the selector top"),
        (
            {"layers": {1: {"selector": "recent", "summary": "min_max"}}},
            "attention.layers.1.summary = min_max has no effect with the selector recent",
        ),
        ({"layers": {1: {"selector": "threshold"}}}, "attention.threshold is not set"),
        ({"workspace_bytes": 0}, "attention.workspace_bytes = 0"),
        ({"workspace_bytes": 2**20, "backend": "flash_moba"}, "backend = flash_moba cannot be kept to a workspace"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(attention, named):
    with pytest.raises(ConfigError, match=named):
        config(**attention)


def test_an_export_says_how_blocks_are_chosen_where_it_is_not_as_in_moba():
    plain = moba_config((LayerAttention("moba", 8, 2), FULL), "full")
    assert (plain["top_k"], plain["version"]) == (2, 1) and "selector" not in plain
    window = moba_config((WINDOW, FULL), "full")
    assert (window["selector"], window["version"]) == ("recent", 2)


def test_full_layers_take_no_selection():
    with pytest.raises(ValueError, match="no selection of blocks"):
        LayerAttention("full", selection=Selection("recent"))
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = moba_layer_spec(get_gpt_layer_local_spec(), block_size=8, top_k=2, selector="recent")
    assert spec.submodules.self_attention.submodules.core_attention.keywords["attention"] == WINDOW


SETTINGS = [
    {"selector": "recent"},
    {"selector": "sink_recent"},
    {"summary": "min_max"},
    {"selector": "threshold", "threshold": 0.6},
    {"share_selection": "mean"},
    {"layers": {1: {"top_k": [2, 4]}}},
]


def test_training_is_the_same_over_ranks():
    """Each variant trains at C = 1 and at C = 2, by heads and by a ring, and over tensor-parallel ranks alike; and none
    as plain MoBA does."""
    _, _, weights = run_ranks(1, train, config(), VOCABULARY, 0)[0]
    plain, *ones = run_ranks(1, train_each, [config(**a) for a in ({}, *SETTINGS)], VOCABULARY, STEPS, weights)[0]
    forms = [{"context": 2}, {"context": 2, "exchange": "p2p"}, {"tensor": 2}]
    configs = [config(parallel, **attention) for attention in SETTINGS for parallel in forms]
    for rank in run_ranks(2, train_each, configs, VOCABULARY, STEPS, weights):
        for number, (losses, norms) in enumerate(rank):
            expected = ones[number // len(forms)]
            torch.testing.assert_close(losses[:1], expected[0][:1], rtol=2e-6, atol=0)
            # Later courses drift apart: Adam divides a gradient that is a rounding error by its own size.
            torch.testing.assert_close(losses, expected[0], rtol=2e-5, atol=0)
            torch.testing.assert_close(norms, expected[1], rtol=2e-4, atol=0)
    for attention, (losses, _) in zip(SETTINGS, ones, strict=True):
        assert max(abs(a - b) for a, b in zip(losses, plain[0], strict=True)) > 1e-4, attention
