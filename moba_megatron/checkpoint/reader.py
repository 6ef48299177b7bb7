"""Reading checkpoints: first the manifest, then the digests, then megatron-core's resharding load."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling

from moba_megatron.checkpoint.common_state import COMMON, COMMON_FILE, read_common
from moba_megatron.checkpoint.manifest import CheckpointError, Manifest, verify
from moba_megatron.checkpoint.state import TrainingState, is_extra_state, load_weights, sharded_model
from moba_megatron.platform.megatron_core import reads_common_state_among_tensors


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
    state.load(_load(folder, requested, require_all=same_layout))
    return manifest


def load_model(folder: Path, model: list[torch.nn.Module], *, check_files: bool = True) -> Manifest:
    """Restore the weights alone, in place, at any parallel layout. Collective."""
    manifest = Manifest.read(folder)
    if check_files:
        _verify_together(folder, manifest)
    load_weights(model, _load(folder, sharded_model(model), require_all=False))
    return manifest


def _load(folder: Path, requested: dict[str, Any], *, require_all: bool) -> dict[str, Any]:
    """Fill what is requested; `require_all`: it has to be all that the checkpoint holds.

    Raises:
        CheckpointError: something requested is not there, or something there was not requested.
    """
    try:
        with _with_common_state(folder) as readable:
            loaded, not_requested, not_stored = dist_checkpointing.load(
                requested, str(readable), strict=StrictHandling.RETURN_ALL
            )
    except (CheckpointingException, KeyError) as error:
        raise CheckpointError(f"{folder} does not fit this model: {error}") from error
    not_requested = not_requested - {COMMON} if require_all else set()
    problems = [f"{key} is missing" for key in sorted(not_stored) if not is_extra_state(key)]
    problems += [f"{key} has no place in it" for key in sorted(not_requested) if not is_extra_state(key)]
    if problems:
        raise CheckpointError(f"{folder} does not fit this model: {'; '.join(problems)}")
    return loaded


@contextmanager
def _with_common_state(folder: Path) -> Iterator[Path]:
    """A checkpoint folder as every supported megatron-core reads it.

    What is no tensor (steps, learning rates) lies in the file `common.pt`; from 0.19 on it is one more entry among the
    tensors, which releases before do not look for. For them it is laid beside links to the other files.
    """
    if (folder / COMMON_FILE).is_file() or reads_common_state_among_tensors():
        yield folder
        return
    common = read_common(folder)
    if common is None:
        raise CheckpointError(f"{folder} has neither {COMMON_FILE} nor the entry {COMMON}")
    state = torch.load(io.BytesIO(common), weights_only=True)[0]
    with tempfile.TemporaryDirectory() as temporary:
        for file in folder.iterdir():
            (Path(temporary) / file.name).symlink_to(file.resolve())
        torch.save(state, Path(temporary) / COMMON_FILE)
        yield Path(temporary)


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
