"""A sweep of runs that take seconds, on the committed synthetic tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from small_run import small_values


def write_sweep(folder: Path, **changes: Any) -> Path:
    """A base configuration and a sweep over it in a folder; returns the sweep's path."""
    values = small_values(folder)
    values["model"]["vocab_size"] = 128
    (folder / "base.yaml").write_text(yaml.safe_dump(values))
    sweep: dict[str, Any] = {
        "base": "base.yaml",
        "dir": str(folder / "sweep"),
        "axes": {
            "size": {"small": {"model.num_layers": 2}, "large": {"model.num_layers": 4}},
            "attention": {"moba": {"attention.kind": "moba"}, "full": {"attention.kind": "full"}},
        },
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep | changes, sort_keys=False))
    return path
