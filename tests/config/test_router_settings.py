"""`attention.router` in a configuration: what goes together, and an error with key, value and fix for what does not."""

from __future__ import annotations

import pytest
from test_config import changed

from moba_megatron.config import ConfigError, config_from_dict, load_config

INDEX = {"attention__router": "index", "attention__router_dim": 8}
FINEST = {**INDEX, "attention__router_heads": "query", "attention__router_keys": "key"}
COPIED = {**FINEST, "attention__router_norm": "none", "attention__router_init": "copied"}


def indexed(**changes):
    return config_from_dict(changed(**{**INDEX, **changes}))


def test_settings_read_back_equal(tmp_path):
    for config in (indexed(), indexed(**FINEST, attention__share_selection="mean", training__train_only=["router"])):
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        assert load_config(tmp_path / "config.yaml") == config
    again = load_config(tmp_path / "config.yaml", ["training.train_only=null", "attention.router_loss=dense"])
    assert (again.training.train_only, again.attention.router_loss) == (None, "dense")


def test_a_copied_index_has_the_shape_of_the_attention():
    size = config_from_dict(changed()).model.head_size
    config = indexed(**{**COPIED, "attention__router_dim": size})
    assert config.attention.router_init == "copied"
    with_norm = {**COPIED, "attention__router_dim": size, "attention__router_norm": "rms"}
    assert indexed(**with_norm, model__qk_layernorm=True).attention.router_norm == "rms"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention__router": "own"}, "attention.router_dim = 8 has no effect with attention.router = own"),
        ({"attention__router_dim": None}, "attention.router_dim is not set"),
        ({"attention__router_dim": 7}, "attention.router_dim = 7: rotary embedding needs an even one"),
        ({"model__rotary_percent": 0.5, "attention__router_dim": 6}, "rotates 3 of its"),
        ({"attention__kind": "full"}, "attention.router = index has no effect with attention.kind = full in every"),
        ({"attention__selector": "recent"}, "the selector recent looks at no scores: use top_k or threshold"),
        ({"attention__selector": "sink_recent"}, "the selector sink_recent looks at no scores"),
        ({"attention__summary": "min_max"}, "attention.summary = min_max: attention.router = index scores means"),
        ({"attention__backend": "flash_moba"}, "attention.backend = flash_moba chooses by attention's own"),
        (
            {"attention__backend": "reference", "parallel__context": 2},
            "parallel.context = 2: it needs the whole pack on one rank",
        ),
        ({"attention__share_selection": "mean"}, "it needs router_heads: query and router_keys: key"),
        ({"attention__router_loss": "none", "attention__router_loss_coeff": 2.0}, "router_loss_coeff = 2.0 has no"),
        ({"attention__router_loss": "none", "training__train_only": ["router"]}, "nothing learns"),
        (
            {"training__train_only": ["router"], "training__offload": ["core_attn"]},
            "training.offload = ['core_attn'] has nothing to offload with training.train_only",
        ),
        ({"attention__router_loss": "dense", "parallel__context": 2}, "use parallel.exchange: a2a"),
        (COPIED, "has router_dim = "),
        ({**COPIED, "attention__router_heads": "key"}, "has router_heads = query, not key"),
        ({**COPIED, "model__qk_layernorm": True}, "has router_norm = rms, not none"),
        ({**COPIED, "model__add_qkv_bias": True}, "an index has no biases: use drawn"),
        ({**COPIED, "attention__key_convolution": 3}, "keys of an index are not convolved"),
    ],
)
def test_what_cannot_work_says_why(changes, said):
    with pytest.raises(ConfigError) as raised:
        indexed(**changes)
    assert any(said in line for line in raised.value.problems), raised.value.problems


def test_a_frozen_rest_needs_an_index():
    with pytest.raises(ConfigError, match="training.train_only = .'router'., but attention.router = own has no"):
        config_from_dict(changed(training__train_only=["router"]))
    with pytest.raises(ConfigError, match="train_only"):
        indexed(training__train_only=["embedding"])
    with pytest.raises(ConfigError, match=r"training.train_only = \[\]: nothing learns; name a part such as router"):
        indexed(training__train_only=[])
    with pytest.raises(ConfigError, match="training.train_only = .'router', 'router'. names one twice"):
        indexed(training__train_only=["router", "router"])
