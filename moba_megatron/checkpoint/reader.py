"""Reading checkpoints: first the manifest, then the digests, then megatron-core's resharding load."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from moba_megatron.checkpoint.common_state import COMMON, COMMON_FILE, read_common
from moba_megatron.checkpoint.finite import named_tensors, require_finite
from moba_megatron.checkpoint.manifest import CheckpointError, Manifest, damaged, misplaced_files, verify
from moba_megatron.checkpoint.pickles import UnsafePickle, check_format, only_known_classes, read_objects
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
        CheckpointError: damaged files, a state that does not fit this model, or weights that are not finite.
    """
    manifest = Manifest.read(folder)
    saved = manifest.config["parallel"]
    if saved["distributed_optimizer"] != parallel["distributed_optimizer"]:
        raise CheckpointError(
            f"{folder} was written with parallel.distributed_optimizer = {saved['distributed_optimizer']}, which the "
            f"optimizer state is bound to; this run has {parallel['distributed_optimizer']}: set it to the saved value"
        )
    _check_together(folder, manifest, digests=check_files)
    same_layout = all(saved[size] == parallel[size] for size in ("tensor", "pipeline"))
    requested = state.sharded(loading=True, with_random_state=same_layout)
    loaded = _load(folder, requested, require_all=same_layout)
    require_finite(named_tensors({**loaded, "scheduler": None, "random": None}), folder)
    state.load(loaded)
    return manifest


def load_model(
    folder: Path,
    model: list[torch.nn.Module],
    *,
    check_files: bool = True,
    leave_out: Callable[[str], bool] = lambda key: False,
) -> Manifest:
    """Restore the weights alone, in place, at any parallel layout. Collective. Raises CheckpointError as
    `load_training` does.

    Args:
        leave_out: weights, by name, that stay as they are.
    """
    manifest = Manifest.read(folder)
    _check_together(folder, manifest, digests=check_files)
    requested = {
        chunk: {key: part for key, part in parts.items() if not leave_out(key)}
        for chunk, parts in sharded_model(model).items()
    }
    load_weights(model, _load(folder, requested, require_all=False), leave_out)
    require_finite((named for chunk in model for named in chunk.named_parameters()), folder)
    return manifest


def _load(folder: Path, requested: dict[str, Any], *, require_all: bool) -> dict[str, Any]:
    """Fill what is requested; `require_all`: it has to be all that the checkpoint holds.

    Raises:
        CheckpointError: something requested is not there, something there was not requested, or pickles that name more
            than the classes of a checkpoint.
    """
    check_format(folder)
    try:
        with _with_common_state(folder) as readable, only_known_classes():
            loaded, not_requested, not_stored = dist_checkpointing.load(
                requested, str(readable), strict=StrictHandling.RETURN_ALL
            )
    except UnsafePickle as error:
        raise UnsafePickle(f"{folder} is not read: {error}") from error
    except CheckpointException as error:
        # What went wrong on other ranks as well, each with its cause.
        rank, (cause, _) = next(iter(error.failures.items()))
        kind = type(cause) if isinstance(cause, CheckpointError) else CheckpointError
        raise kind(f"{folder} cannot be read (rank {rank}): {type(cause).__name__}: {cause}") from error
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

    What is not a tensor (steps, learning rates) lies in the file `common.pt`; from 0.19 on it is one more entry among
    the tensors, which releases before do not look for. For them it is laid beside links to the other files.
    """
    if (folder / COMMON_FILE).is_file() or reads_common_state_among_tensors():
        yield folder
        return
    common = read_common(folder)
    if common is None:
        raise CheckpointError(f"{folder} has neither {COMMON_FILE} nor the entry {COMMON}")
    state = read_objects(common)[0]
    with tempfile.TemporaryDirectory() as temporary:
        for file in folder.iterdir():
            (Path(temporary) / file.name).symlink_to(file.resolve())
        torch.save(state, Path(temporary) / COMMON_FILE)
        yield Path(temporary)


def _check_together(folder: Path, manifest: Manifest, *, digests: bool) -> None:
    """Compare the files with the manifest: names and sizes on rank 0, the digests on all ranks, each its share. All
    ranks raise if any found a problem."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = verify(folder, manifest, rank, ranks) if digests else misplaced_files(folder, manifest) if rank == 0 else []
    found: list[list[str]] = [[] for _ in range(ranks)]
    torch.distributed.all_gather_object(found, own)
    if problems := [line for lines in found for line in lines]:
        raise damaged(folder, problems)
