"""When a run saves, the facts in its checkpoints, and failed saves.

A failed save leaves earlier checkpoints unchanged. With `checkpoint.on_save_error: continue` the run continues and
saves again at the next regular step. The last save of a process must succeed, or its last steps would be lost.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from moba_megatron import __version__
from moba_megatron.checkpoint import CheckpointWriter, Manifest, SaveError, TrainingState, find_latest
from moba_megatron.config import Config
from moba_megatron.planning.plan_stages import whole_model
from moba_megatron.runs.disk import size_text
from moba_megatron.runs.folder import RunFolder
from moba_megatron.training.data_position import DataPosition
from moba_megatron.training.preflight import Preflight

# Of a weight, and of what the optimizer keeps for one that learns: Adam's moments, in bf16 also the weight in fp32.
_BYTES = {"fp32": (4, 8), "bf16": (2, 12)}


class Saver:
    """Saves one run's states. All ranks call the same methods together.

    Args:
        before_publishing: called before each save; what belongs to it must be on disk afterwards.
        say: shows a line to the person who watches.
    """

    def __init__(
        self,
        config: Config,
        ready: Preflight,
        folder: RunFolder,
        before_publishing: Callable[[], None],
        say: Callable[[str], None],
    ):
        self.config, self.ready, self.folder = config, ready, folder
        self.before_publishing, self.say = before_publishing, say
        self.writer = CheckpointWriter(
            folder.checkpoints, keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous
        )

    def save(self, state: TrainingState, position: DataPosition, *, last: bool) -> None:
        """Start a checkpoint of the state at a position, after the one before it is written.

        Args:
            last: whether the process ends with it, so that it must succeed; it is written when this returns.

        Raises:
            SaveError: on every rank, where `checkpoint.on_save_error` or `last` says so.
        """
        self.wait()
        self._guarded(lambda: self._save(state, position, last), last)

    def poll(self) -> None:
        """Publish a finished save, if there is one."""
        self._guarded(self.writer.poll)

    def wait(self) -> None:
        """Wait until nothing is being written."""
        self._guarded(self.writer.wait)

    def _save(self, state: TrainingState, position: DataPosition, last: bool) -> None:
        self.before_publishing()
        self._check_space(position.step)
        self.writer.save(state, self._manifest(position))
        if last:
            self.writer.wait()

    def _guarded(self, act: Callable[[], object], last: bool = False) -> None:
        try:
            act()
        except SaveError as error:
            self.writer.discard()
            if last or self.config.checkpoint.on_save_error == "stop":
                raise
            newest = find_latest(self.folder.checkpoints)
            stays = f"{newest.name} stays" if newest else "there is none before it"
            self.say(f"checkpoint not written, {stays} (checkpoint.on_save_error = continue): {error}")

    def _check_space(self, step: int) -> None:
        """Raise on every rank where the disk has less room than the checkpoint before took, or than weights and
        optimizer state take."""
        needed = self._expected_bytes()
        free = [0]
        if torch.distributed.get_rank() == 0:
            # They may be a link to another disk.
            where = self.folder.checkpoints if self.folder.checkpoints.exists() else self.folder.path
            free = [shutil.disk_usage(where).free]
        torch.distributed.broadcast_object_list(free, src=0)
        if free[0] < needed:
            raise SaveError(
                f"{self.folder.checkpoints / f'step_{step}'} needs about {size_text(needed)}, and its disk has "
                f"{size_text(free[0])} left: make room, or give run.dir another disk"
            )

    def _expected_bytes(self) -> int:
        """Bytes of a checkpoint, as rank 0 finds them; a little less than it takes."""
        found = [0]
        if torch.distributed.get_rank() == 0:
            newest = find_latest(self.folder.checkpoints)
            of_weight, of_state = _BYTES[self.config.training.precision]
            model = whole_model(self.config, self.ready.vocab_size)
            first = model.parameters * of_weight + model.trained * of_state
            found = [_bytes_of(newest) if newest else first]
        torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def _manifest(self, position: DataPosition) -> Manifest:
        libraries = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
        return Manifest(
            step=position.step,
            consumed_samples=position.samples,
            consumed_tokens=position.tokens,
            data_changes=list(position.changes),
            skipped_batches=list(position.skipped),
            config=self.config.model_dump(mode="json"),
            schedule=self.ready.schedule.to_dict(),
            data=self.ready.data.identity,
            versions={"moba-megatron": __version__, **libraries},
        )


def _bytes_of(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.iterdir())
