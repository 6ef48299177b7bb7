"""`environment.json` of a run folder: on what the run runs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform as machine
from pathlib import Path

import torch

from moba_megatron import __version__

PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine", "flash-attn", "numpy")


def write_environment(folder: Path) -> None:
    """Record versions and hardware as rank 0 sees them. A start on another machine replaces the record."""
    (folder / "environment.json").write_text(json.dumps(environment_facts(), indent=1) + "\n")


def environment_facts() -> dict[str, str | int]:
    """Versions of what decides the numbers, and the hardware of this process."""
    found: dict[str, str | int] = {"moba-megatron": __version__, "python": machine.python_version()}
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
        "system": machine.platform(),
        "processor": _processor(),
        "cores that rank 0 may use": len(os.sched_getaffinity(0)),
        "ranks": ranks,
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), machine.machine())
