"""The planner counts the weights of an index as the model has them."""

from __future__ import annotations

import pytest
from model_examples import tiny

from moba_megatron.model.builder import count_parameters
from moba_megatron.planning.plan_stages import index_of_rank, layer_parameters


@pytest.mark.parametrize("heads", ["key", "query"])
@pytest.mark.parametrize("keys", ["shared", "key"])
@pytest.mark.parametrize("norm", ["rms", "none"])
def test_an_index_is_counted(heads, keys, norm):
    index = {"router": "index", "router_dim": 6, "router_heads": heads, "router_keys": keys, "router_norm": norm}
    config = tiny(attention=index)
    of_layers = 2 * (layer_parameters(config) + index_of_rank(config))
    assert of_layers + config.model.hidden_size == count_parameters(config).layers
