"""The source of a model for its card: the model of its first weights, and the license of that model.

The facts come from the head of its README.md, its config.json, or the name of its folder in the cache of Hugging Face's
hub. A run keeps them in `RUN/origin.json` from its first step on, because the source may be gone at the time of the
export. A run that starts from another run copies that file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from moba_megatron.runs.files import write_whole
from moba_megatron.runs.folder import RunFolder

README, CONFIG = "README.md", "config.json"
_LICENSE = ("license", "license_name", "license_link")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def origin_of(source: str | Path) -> dict[str, Any]:
    """Facts about a Hugging Face folder, a run folder or a checkpoint: some of `base_model` (a name on the hub),
    `license`, `license_name` and `license_link`, as model cards write them."""
    source = Path(source)
    if not (source / CONFIG).is_file():
        return read_origin(RunFolder(source)) or read_origin(RunFolder.of(source))
    card, config = read_card(source), json.loads((source / CONFIG).read_text(encoding="utf-8"))
    # A folder without a name of its own has what it was made of.
    base = _in_cache(source) or _hub_name(config.get("_name_or_path")) or card.get("base_model")
    known = {"base_model": base, **{key: card.get(key, config.get(key)) for key in _LICENSE}}
    return {key: value for key, value in known.items() if isinstance(value, str | list) and value}


def keep_origin(run: RunFolder, source: str | Path) -> None:
    """Write the facts about the source of a run's first weights into the run folder; nothing where nothing is."""
    if known := origin_of(source):
        run.path.mkdir(parents=True, exist_ok=True)
        write_whole(run.origin, json.dumps(known, indent=1) + "\n")


def read_origin(run: RunFolder) -> dict[str, Any]:
    """What the run folder keeps; empty where it keeps nothing."""
    return json.loads(run.origin.read_text(encoding="utf-8")) if run.origin.is_file() else {}


def read_card(folder: Path) -> dict[str, Any]:
    """The head of a folder's README.md; empty without a readable one."""
    path = folder / README
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, flags=re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        values = None
    return values if isinstance(values, dict) else {}


def _in_cache(folder: Path) -> str | None:
    """The name of a model by its place in the hub's cache, `models--OWNER--NAME/snapshots/REVISION`."""
    found = [_IN_CACHE.fullmatch(part) for part in folder.resolve().parts]
    return next((f"{match[1]}/{match[2]}" for match in found if match), None)


def _hub_name(name: Any) -> str | None:
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) and not Path(name).exists() else None
