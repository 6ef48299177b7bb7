"""A whole model on a GPU, in Transformer Engine's layers and in local ones: `pytest -m gpu`. Needs megatron-core."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)

from distributed import run_ranks  # noqa: E402
from model_steps import step  # noqa: E402

from moba_megatron.platform import optional_libraries  # noqa: E402

NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@NEEDS_A_GPU
@pytest.mark.parametrize("packed", [False, True])
def test_layers_of_transformer_engine_give_the_loss_of_local_ones(packed):
    """From the same weights, up to the rounding of bf16, which differs from layer to layer."""
    library = optional_libraries()["transformer_engine"]
    if not library.available:
        pytest.skip(library.reason)
    local, te = (step(packed, implementation) for implementation in ("local", "transformer_engine"))
    assert abs(te["loss"] - local["loss"]) <= 2e-2 * local["loss"]
    assert abs(te["norm"] - local["norm"]) <= 5e-2 * local["norm"]


@pytest.mark.gpu
@NEEDS_A_GPU
@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step_never_makes_the_host_wait(packed):
    assert step(packed, "local", forbid_waiting=True)["loss"] > 0


@pytest.mark.parametrize("packed", [False, True])
def test_the_step_on_a_cpu(packed):
    """What the tests above rest on: near the loss of a guess, with a gradient."""
    (found,) = run_ranks(1, step, packed, "local", prepare=False)
    assert 4.0 < found["loss"] < 4.3 and found["norm"] > 1e-3
