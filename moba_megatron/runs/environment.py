"""`environment.json` of a run folder: the machine and versions of the run, and its working directory."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform as machine
import subprocess
from pathlib import Path

import torch

from moba_megatron import __version__
from moba_megatron.runs.files import read_json, write_whole
from moba_megatron.runs.folder import RunFolder

_START = "working directory"
PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine", "flash-attn", "numpy")


def write_environment(folder: RunFolder) -> None:
    """Record versions and hardware as rank 0 sees them. A start on another machine replaces the record."""
    write_whole(folder.environment, json.dumps(environment_facts(), indent=1) + "\n")


def environment_facts() -> dict[str, str | int]:
    """Versions of what decides the numbers, and the hardware of this process."""
    found: dict[str, str | int] = {"moba-megatron": __version__, "python": machine.python_version()}
    commit = _commit()
    if commit:
        found["commit"] = commit
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if gpus:
        found["GPUs of the first node"] = f"{len(gpus)} x {gpus[0]}"
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return {
        **found,
        _START: str(Path.cwd()),
        "system": machine.platform(),
        "processor": _processor(),
        "cores that rank 0 may use": len(os.sched_getaffinity(0)),
        "ranks": ranks,
    }


def start_folder(folder: RunFolder) -> Path | None:
    """The working directory that a run was last started in, from which the relative paths of its configuration count;
    None where it is not on record."""
    found = (read_json(folder.environment) or {}).get(_START)
    return None if found is None else Path(found)


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, with `-dirty` where files differ from it; None outside of
    one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), machine.machine())
