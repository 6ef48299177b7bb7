"""What the distributed optimizer saves belongs to the parameter under whose name it is saved."""

from contextlib import contextmanager, nullcontext

import pytest
from distributed import run_ranks
from model_examples import loss_of_batch, tiny

from moba_megatron.checkpoint import state as checkpoint_state
from moba_megatron.checkpoint.state import TrainingState

pytestmark = pytest.mark.usefixtures("small_buckets")
VOCABULARY = 61


def saved_state(fix):
    """(gradient buckets with padding before another, largest difference between a saved moment and the optimizer's own)
    after one step on two ranks.

    Args:
        fix: stands for the fix of the places.
    """
    from moba_megatron import platform
    from moba_megatron.model.builder import build_model
    from moba_megatron.model.schedule import AttentionSchedule
    from moba_megatron.training.optimizer import build_optimizer, wrap_data_parallel

    checkpoint_state._places_without_padding = fix
    config = tiny(parallel={"distributed_optimizer": True, "overlap_grad_reduce": True})
    platform.start_model_parallel(config.parallel)
    chunks = build_model(config, VOCABULARY, AttentionSchedule.from_config(config.attention, 2))
    wrapped = wrap_data_parallel(chunks, config)
    optimizer = build_optimizer(wrapped, config)
    loss_of_batch(config, wrapped, 0)
    optimizer.step()
    state = TrainingState(chunks, optimizer, scheduler=Scheduler()).sharded(loading=False, with_random_state=False)
    (part,) = optimizer.chained_optimizers
    padded = sum(
        bucket.grad_data.numel() > bucket.numel_unpadded for buffer in part.buffers for bucket in buffer.buckets[:-1]
    )
    difference, compared = 0.0, 0
    saved = state["optimizer"]["param_state"]
    parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
    for place, parameter in enumerate(parameters):
        if parameter not in part.model_param_group_index_map:
            continue  # no part of it is this rank's
        group, index = part.model_param_group_index_map[parameter]
        shard = part.optimizer.param_groups[group]["params"][index]
        here = part._get_model_param_range_map(parameter)["param"]
        own = part.optimizer.state[shard]["exp_avg"]
        difference = max(
            difference, (saved[place]["exp_avg"].data.flatten()[here.start : here.end] - own).abs().max().item()
        )
        compared += 1
    assert compared > 2
    return padded, difference


class Scheduler:
    def state_dict(self):
        return {}


def test_moments_are_saved_under_their_parameter():
    for padded, difference in run_ranks(2, saved_state, fixed):
        assert padded > 1
        assert difference == 0.0


fixed = checkpoint_state._places_without_padding


@contextmanager
def twice(optimizer):
    """As if megatron-core had fixed its places itself, which it does from 0.20 on."""
    with fixed(optimizer), fixed(optimizer):
        yield


@pytest.mark.parametrize("fix", [lambda optimizer: nullcontext(), twice], ids=["not", "twice"])
def test_state_of_other_parameters_is_never_saved(fix):
    with pytest.raises(AssertionError, match="would be saved under the wrong parameter"):
        run_ranks(2, saved_state, fix)
