"""How numbers and texts are written down: a hash of all bits and a few numbers for people, and no places or times."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


def describe(tensor: Tensor) -> str:
    """Shape, type, a hash of the bytes, and the first numbers."""
    flat = tensor.detach().cpu().contiguous().flatten()
    shape, kind = "x".join(map(str, tensor.shape)) or "scalar", str(tensor.dtype).removeprefix("torch.")
    digest = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:20] if len(flat) else "empty"
    first = " ".join(f"{number:.6g}" for number in flat[:3].tolist())
    return f"{shape} {kind} {digest} [{first}]"


def describe_all(names: Iterable[str], tensors: Iterable[Tensor]) -> str:
    """Several tensors in a line."""
    return "; ".join(f"{name} {describe(tensor)}" for name, tensor in zip(names, tensors, strict=True))


def write_lines(out: Path, name: str, lines: Iterable[str]) -> None:
    """Write a file of a snapshot."""
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_json(values: Any) -> str:
    """JSON with sorted keys; floats are written in full."""
    return json.dumps(values, indent=1, sort_keys=True)


def without_places(text: str, *folders: Path) -> str:
    """A text in which this checkout, the Python that runs and the given folders have names of their own."""
    named = {str(folder): f"<folder {number}>" for number, folder in enumerate(folders, start=1)}
    named |= {str(ROOT): "<checkout>", sys.executable: "<python>", sys.prefix: "<prefix>", sys.base_prefix: "<base>"}
    for place in sorted(named, key=len, reverse=True):
        text = text.replace(place, named[place])
    return text


def without_times(text: str) -> str:
    """A text without dates, times of day, durations, commits, bars of progress, and what made a dataset when."""
    kept = [line for line in text.splitlines() if not _PASSING_LINE.search(line)]
    text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?(Z|[+-]\d\d:?\d\d)?", "<time>", "\n".join(kept))
    text = re.sub(r"\b\d+:\d\d:\d\d\b", "<time>", text)
    text = re.sub(r"\bin [\d,.]+ (?:s|ms|minutes)\b", "in <seconds>", text)
    return re.sub(r"\bcommit [0-9a-f]{7,40}\b", "commit <commit>", text)


# A bar has no corners, as the heads of tables do. How often samples are counted depends on the time.
_PASSING_LINE = re.compile(r"^[^┏┡╞]*━━[^┓┩]*$|^made \d{4}-|^versions: |: \d+ of \d+ samples$")
