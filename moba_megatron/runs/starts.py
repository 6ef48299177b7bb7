"""`starts.jsonl` of a run folder: the layout of each part of the run, one line a start."""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from moba_megatron.config import Config
from moba_megatron.config.reading import read_plain_yaml
from moba_megatron.runs.files import readable_json_lines, write_whole
from moba_megatron.runs.folder import RunFolder


def record_start(folder: RunFolder, config: Config, step: int) -> None:
    """Add this start, from `step` on; those whose steps it takes anew are gone.

    Args:
        step: the step that the run goes on from, 0 for a new one.
    """
    gpus = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    start = {
        "step": step,
        "processes": torch.distributed.get_world_size(),
        "GPU": gpus,
        "parallel": config.parallel.model_dump(mode="json"),
    }
    kept = [line for line in readable_json_lines(folder.starts)[0] if line["step"] < step]
    write_whole(folder.starts, "".join(json.dumps(line) + "\n" for line in [*kept, start]))


def layout_changes(folder: RunFolder) -> list[tuple[int, dict[str, tuple[Any, Any]]]]:
    """For each start at another layout than the one before: the step that it went on from, and what changed, by key,
    from what to what. Runs without `starts.jsonl` have their kept configurations for it, which know no number of
    processes."""
    starts = readable_json_lines(folder.starts)[0] or _from_configurations(folder)
    changes = []
    for before, now in zip(starts, starts[1:], strict=False):
        old, new = _flat(before), _flat(now)
        keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
        if keys:
            changes.append((now["step"], {key: (old.get(key), new.get(key)) for key in keys}))
    return changes


def _from_configurations(folder: RunFolder) -> list[dict[str, Any]]:
    kept = {int(re.sub(r"\D", "", path.stem)): path for path in folder.path.glob("config.until_step_*.yaml")}
    steps, files = [0, *sorted(kept)], [kept[step] for step in sorted(kept)]
    files += [folder.config] if folder.config.is_file() else []
    values = [read_plain_yaml(path) or {} for path in files]
    return [{"step": step, "parallel": part.get("parallel", {})} for step, part in zip(steps, values, strict=False)]


def _flat(start: dict[str, Any]) -> dict[str, Any]:
    sizes = {f"parallel.{key}": value for key, value in start["parallel"].items()}
    return {**{key: value for key, value in start.items() if key not in ("step", "parallel")}, **sizes}
