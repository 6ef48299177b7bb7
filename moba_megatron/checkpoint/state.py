"""Everything that a training run must carry over a stop: weights, optimizer, learning-rate schedule and random states.

Weights and optimizer state are described to megatron-core by their place in the whole model, so a checkpoint written at
one parallel layout loads at another. Random states belong to a (pipeline, tensor) position and are only restored at the
same layout.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import megatron.core
import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from moba_megatron.checkpoint.manifest import CheckpointError
from moba_megatron.checkpoint.optimizer_parts import fit_parts, parts_of

# The default type of the distributed optimizer's checkpoint cannot be resumed in megatron-core 0.16. Without the second
# key an optimizer of experts would store its state under names that only one like it finds. megatron-core gets a copy:
# it adds the process groups of the moment.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass
class TrainingState:
    """Unwrapped model chunks of this pipeline rank, and what trains them."""

    model: list[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def sharded(self, *, loading: bool, with_random_state: bool = True) -> dict[str, Any]:
        """The sharded state dict that megatron-core saves or fills."""
        state = sharded_model(self.model)
        with _places_without_padding(self.optimizer):
            state["optimizer"] = self.optimizer.sharded_state_dict(state, is_loading=loading, metadata=dict(SHARDING))
        if not loading:
            _refuse_misplaced_state(self.optimizer, state["optimizer"])
        state["scheduler"] = self.scheduler.state_dict()
        if with_random_state:
            state["random"] = _sharded_random_state()
        return state

    def load(self, loaded: dict[str, Any]) -> None:
        """Take over what `dist_checkpointing.load` returned for `sharded(loading=True)`."""
        load_weights(self.model, loaded)
        with torch.no_grad():
            self.optimizer.load_state_dict(fit_parts(self.optimizer, loaded["optimizer"]))
        self.scheduler.load_state_dict(loaded["scheduler"])
        if "random" in loaded:
            _set_random_state(loaded["random"])


@contextmanager
def _places_without_padding(optimizer: MegatronOptimizer) -> Iterator[None]:
    """The distributed optimizer packs its state bucket by bucket without the padding at their ends, and then looks
    parameters up at places that count it: from the second bucket on, what it saves belongs to others. In here the
    places are right. (megatron-core fixes it in 0.20, pull request 5077; `_refuse_misplaced_state` finds both fixes
    together as well as none.)

    There are several buckets where the reduction of gradients overlaps, and on the first and last pipeline stage with
    tied embeddings; padding, where a bucket is not a multiple of 128 and of the ranks that share it.
    """
    buffers = [buffer for part in parts_of(optimizer) for buffer in getattr(part, "buffers", [])]
    before = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer in buffers:
            padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
            buffer.param_index_map = {
                parameter: (start - sum(padding[:bucket]), end - sum(padding[:bucket]), bucket)
                for parameter, (start, end, bucket) in buffer.param_index_map.items()
            }
        yield
    finally:
        for buffer, places in zip(buffers, before, strict=True):
            buffer.param_index_map = places


def _refuse_misplaced_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Compare the first and last values of the optimizer's copy of each parameter, as it would be saved, with it.

    Raises:
        CheckpointError: they differ, so what would be saved belongs to other parameters.
    """
    parts = parts_of(optimizer)
    for number, part in enumerate(parts):
        saved = (state if len(parts) == 1 else state[number]).get("param_state") or {}
        parameters = [p for buffer in getattr(part, "buffers", []) for p in buffer.param_index_map]
        for place, entry in saved.items():
            if not isinstance(entry, dict) or "param" not in entry:
                continue
            kept, parameter = entry["param"].data.flatten()[[0, -1]], parameters[place].detach().flatten()[[0, -1]]
            if not torch.allclose(kept.to(parameter), parameter, rtol=0, atol=0, equal_nan=True):
                raise CheckpointError(
                    f"optimizer state would be saved under the wrong parameter ({entry['param'].key}): this "
                    f"megatron-core ({megatron.core.__version__}) places it in another way than 0.16 to 0.19. Use "
                    "one of these"
                )


def sharded_model(model: list[torch.nn.Module]) -> dict[str, Any]:
    """Sharded state dict of the weights alone: one entry for each model chunk."""
    return {_chunk_name(model, i): chunk.sharded_state_dict(metadata=dict(SHARDING)) for i, chunk in enumerate(model)}


def load_weights(
    model: list[torch.nn.Module], loaded: dict[str, Any], leave_out: Callable[[str], bool] = lambda key: False
) -> None:
    """Fill model chunks from what `dist_checkpointing.load` returned. Extra states stay out: Transformer Engine may
    unpickle its own, and they hold nothing but scales of fp8, in which nothing here is trained.

    Args:
        leave_out: weights, by name, that may be missing.

    Raises:
        CheckpointError: parameters that one of the two lacks.
    """
    for i, chunk in enumerate(model):
        weights = {key: part for key, part in loaded[_chunk_name(model, i)].items() if not is_extra_state(key)}
        found = chunk.load_state_dict(weights, strict=False)
        missing = [key for key in found.missing_keys if not leave_out(key)]
        wrong = [key for key in (*missing, *found.unexpected_keys) if not is_extra_state(key)]
        if wrong:
            raise CheckpointError(f"the checkpoint does not fit this model: {', '.join(sorted(wrong))}")


def is_extra_state(key: str) -> bool:
    """Whether a key is not a parameter but what a module keeps beside them: Transformer Engine's scales of fp8, empty
    without. Its layers have it where local ones have none."""
    return key.endswith("_extra_state")


def _chunk_name(model: list[torch.nn.Module], index: int) -> str:
    return "model" if len(model) == 1 else f"model{index}"


def _sharded_random_state() -> ShardedObject:
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    pipeline = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    tensor = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("random", states, (pipeline[1], tensor[1]), (pipeline[0], tensor[0]), replica_id=replica)


def _set_random_state(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
