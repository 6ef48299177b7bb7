"""Settings of the rotary embedding: what contradicts itself or does nothing is refused; defaults follow the kind."""

from __future__ import annotations

from typing import Any

import pytest
from test_config import SMALL

from moba_megatron.config import ConfigError, ModelConfig, config_from_dict


def configured(**model: Any) -> ModelConfig:
    """SMALL, with heads of 16 channels, and these settings of its rotary embedding."""
    rotary = {f"rotary_{key}": value for key, value in model.items()}
    return config_from_dict({**SMALL, "model": {**SMALL["model"], **rotary}}).model


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"scaling_factor": 2.0}, "rotary_scaling_factor = 2.0 has no effect with model.rotary_scaling = none"),
        ({"scaling": "llama3", "beta_fast": 16.0}, "rotary_beta_fast = 16.0 has no effect"),
        ({"truncate": False}, "rotary_truncate = False has no effect with model.rotary_scaling = none"),
        ({"scaling": "linear", "mscale": 1.0}, "model.rotary_mscale = 1.0 has no effect"),
        ({"scaling": "yarn", "long_factors": [1.0] * 8}, "rotary_long_factors has no effect"),
        ({"scaling": "llama3", "attention_factor": 1.1}, "rotary_attention_factor = 1.1 has no effect"),
        ({"scaling": "yarn", "beta_fast": 1.0, "beta_slow": 2.0}, "rotary_beta_fast = 1.0 must not be below"),
        ({"scaling": "yarn", "base": 1.0}, "model.rotary_base = 1.0"),
        ({"scaling": "yarn", "mscale": 1.0}, "set both or none"),
        ({"scaling": "yarn", "scaling_factor": 4.0, "attention_factor": 1.0}, "set it to null for 1.13863"),
        ({"scaling": "yarn", "mscale": 1.0, "mscale_all_dim": 0.7, "attention_factor": 1.2}, "set one of them"),
        ({"scaling": "linear", "interpolation": 2.0}, "rotary_interpolation = 2.0 with model.rotary_scaling = linear"),
        ({"scaling": "longrope", "short_factors": [1.0] * 8}, "needs model.rotary_short_factors and"),
        ({"scaling": "longrope", "short_factors": [1.0], "long_factors": [1.0] * 8}, "have 1 entries: give 8"),
    ],
)
def test_what_contradicts_itself_or_does_nothing_is_refused(settings, expected):
    with pytest.raises(ConfigError) as error:
        configured(**settings)
    assert expected in str(error.value)


def test_the_attention_factor_follows_the_kind():
    yarn = {"scaling": "yarn", "scaling_factor": 4.0}
    assert configured().attention_factor == configured(attention_factor=1.0).attention_factor == 1.0
    assert configured(**yarn).attention_factor == pytest.approx(1.138629, abs=1e-6)
    assert configured(**yarn, attention_factor=1.5).attention_factor == 1.5
    assert configured(**yarn, mscale=1.0, mscale_all_dim=1.0).attention_factor == 1.0
    assert configured(**yarn, interpolation=2.0).attention_factor == pytest.approx(1.138629, abs=1e-6)
