"""The needle recipe: two configurations of equal cost, and samples that no window of that cost reaches."""

from __future__ import annotations

from pathlib import Path

import torch

from moba_megatron.config import load_config
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.ops import select_blocks

CONFIGS = Path(__file__).parents[3] / "configs/needle"


def test_the_two_configurations_differ_in_the_selector_alone():
    moba, recent = (load_config(CONFIGS / f"{name}.yaml").model_dump() for name in ("moba", "recent"))
    assert (moba["attention"].pop("selector"), recent["attention"].pop("selector")) == ("top_k", "recent")
    assert moba["run"].pop("dir") != recent["run"].pop("dir")
    assert moba == recent


def test_no_window_of_that_cost_reaches_the_start_of_the_text():
    """Through all layers a window of the nearest blocks reaches at most layers x top_k x block_size tokens back."""
    config = load_config(CONFIGS / "recent.yaml")
    length = config.data.sequence_length
    for layers in AttentionSchedule.from_config(config.attention, config.model.num_layers).stages:
        keys = torch.zeros(length, 1, 8)
        sizes = {"block_size": layers[0].block_size, "top_k": layers[0].top_k}
        ids = select_blocks(keys, keys, **sizes, selector=layers[0].selection.selector)
        reach = sum(length - ids[-1, 0].min().item() * layer.block_size for layer in layers)
        assert reach == 128 <= length / 4
