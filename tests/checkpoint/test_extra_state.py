"""Layers with and without Transformer Engine's extra state read each other's checkpoints; nothing else is forgiven."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from small_run import read_metrics, small_config, train_here

from moba_megatron.model import specs
from moba_megatron.model.norm import RMSNorm


class NormWithExtraState(RMSNorm):
    """Stands for Transformer Engine's norm, which stores bytes beside its weight."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Nothing to keep."""


class NormWithAnotherParameter(RMSNorm):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = torch.nn.Parameter(torch.ones(1))


def train_with(norm: type, config) -> None:
    specs.RMSNorm = norm
    train_here(config)


def run(tmp_path: Path, folder: str, norm: type, **changes) -> list[float]:
    config = small_config(
        tmp_path, run__dir=str(tmp_path / folder), training__steps=4, model__qk_layernorm=True, **changes
    )
    run_ranks(1, train_with, norm, config)
    return [line["loss"] for line in read_metrics(tmp_path / folder)]


@pytest.mark.parametrize(
    ("saved", "later"), [(RMSNorm, NormWithExtraState), (NormWithExtraState, RMSNorm)], ids=["to", "from"]
)
def test_extra_state_may_be_missing_or_left_over(tmp_path, saved, later):
    whole = run(tmp_path, "before", saved, checkpoint__every=2)
    checkpoint = str(tmp_path / "before/checkpoints/step_2")
    assert run(tmp_path, "after", later, checkpoint__resume=checkpoint) == whole[2:]
    begun = run(tmp_path, "begun", later, model__init_from=checkpoint, checkpoint__keep=1)
    assert begun[0] < whole[0]


@pytest.mark.parametrize(
    ("saved", "later", "says"),
    [(RMSNorm, NormWithAnotherParameter, "is missing"), (NormWithAnotherParameter, RMSNorm, "has no place in it")],
)
def test_a_parameter_may_be_neither(tmp_path, saved, later, says):
    run(tmp_path, "before", saved, checkpoint__every=2)
    with pytest.raises(AssertionError, match=f"final_layernorm.gain {says}"):
        run(tmp_path, "after", later, checkpoint__resume=str(tmp_path / "before/checkpoints/step_2"))
