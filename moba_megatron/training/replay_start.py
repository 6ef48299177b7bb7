"""The checkpoint from which a step is computed again."""

from __future__ import annotations

from pathlib import Path

from moba_megatron.checkpoint import Manifest, list_checkpoints
from moba_megatron.config import Config, ConfigError
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.runs.files import readable_json_lines
from moba_megatron.runs.folder import RunFolder
from moba_megatron.training.resume import differences


def replay_checkpoint(config: Config, schedule: AttentionSchedule, data: dict[str, str]) -> Path | None:
    """The newest checkpoint of the run before the step to replay; None without one: then the replay starts from the
    first weights.

    Raises:
        ConfigError: there is no run, or it has other settings.
    """
    folder, step = RunFolder(config.run.dir), config.training.replay
    if not folder.metrics.is_file():
        raise ConfigError([f"training.replay = {step}: run.dir = {folder} holds no run; give the run's own command"])
    before = [path for path in list_checkpoints(folder.checkpoints) if Manifest.read(path).step < step]
    if not before:
        starts, _ = readable_json_lines(folder.starts)
        if starts and starts[0]["step"] > 0:
            raise ConfigError([
                f"training.replay = {step}: {folder.checkpoints} has no checkpoint before it, and the run began after "
                f"step {starts[0]['step']} of another: replay a later step, or keep more checkpoints (checkpoint.keep)"
            ])  # fmt: skip
        return None
    problems = differences(Manifest.read(before[-1]), config, schedule, data)
    if problems:
        raise ConfigError([f"{before[-1]} belongs to a run with other settings", *problems])
    return before[-1]
