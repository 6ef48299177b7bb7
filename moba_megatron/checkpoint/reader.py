"""Reading checkpoints: first the manifest, then the digests, then megatron-core's resharding load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling

from moba_megatron.checkpoint.manifest import CheckpointError, Manifest, verify
from moba_megatron.checkpoint.state import TrainingState, load_weights, sharded_model


def load_training(
    folder: Path, state: TrainingState, parallel: dict[str, Any], *, check_files: bool = True
) -> Manifest:
    """Restore a whole training state, in place. Collective.

    Args:
        parallel: the parallel section of the running configuration. Random states are restored only if tensor and
            pipeline sizes are those of the checkpoint; the optimizer's kind must be the same.

    Raises:
        CheckpointError: damaged files, or a state that does not fit this model.
    """
    manifest = Manifest.read(folder)
    saved = manifest.config["parallel"]
    if saved["distributed_optimizer"] != parallel["distributed_optimizer"]:
        raise CheckpointError(
            f"{folder} was written with parallel.distributed_optimizer = {saved['distributed_optimizer']}, which the "
            f"optimizer state is bound to; this run has {parallel['distributed_optimizer']}: set it to the saved value"
        )
    if check_files:
        _verify_together(folder, manifest)
    same_layout = all(saved[size] == parallel[size] for size in ("tensor", "pipeline"))
    requested = state.sharded(loading=True, with_random_state=same_layout)
    strict = StrictHandling.RAISE_ALL if same_layout else StrictHandling.RAISE_UNEXPECTED
    state.load(_load(folder, requested, strict))
    return manifest


def load_model(folder: Path, model: list[torch.nn.Module], *, check_files: bool = True) -> Manifest:
    """Restore the weights alone, in place, at any parallel layout. Collective."""
    manifest = Manifest.read(folder)
    if check_files:
        _verify_together(folder, manifest)
    load_weights(model, _load(folder, sharded_model(model), StrictHandling.RAISE_UNEXPECTED))
    return manifest


def _load(folder: Path, requested: dict[str, Any], strict: StrictHandling) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(requested, str(folder), strict=strict)
    except (CheckpointingException, KeyError) as error:
        raise CheckpointError(f"{folder} does not fit this model: {error}") from error


def _verify_together(folder: Path, manifest: Manifest) -> None:
    """Each rank verifies its share of the files; all ranks raise if any found a problem."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: list[list[str]] = [[] for _ in range(ranks)]
    torch.distributed.all_gather_object(found, verify(folder, manifest, rank, ranks))
    problems = [line for lines in found for line in lines]
    if problems:
        raise CheckpointError(
            f"{folder} is damaged: {'; '.join(problems)}. Remove the folder to continue from the checkpoint before it, "
            "or go on from another one in another run.dir (checkpoint.resume=PATH)"
        )
