"""Sizes and digests of an export's files in `exported_from.json`, which also has its own digest.

Users edit an export's model card and settings, and add files. So when a folder is loaded, only files that nobody writes
by hand are compared with their digests. An export inside a run folder is compared as a whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moba_megatron.checkpoint import CheckpointError
from moba_megatron.checkpoint.manifest import OWN_DIGEST, differs, digest_file, digest_values
from moba_megatron.config.inside import named_file

SOURCE = "exported_from.json"
CARD = "README.md"
# Written by hand by nobody: weights, their index, the vocabulary.
_MACHINE_MADE = (".safetensors", ".safetensors.index.json", "tokenizer.json")


def write_source(folder: Path, values: dict[str, Any]) -> None:
    """Write `exported_from.json`: what the export was made of, and digests of all files that are there but the card."""
    files = {path.name: digest_file(path) for path in sorted(folder.iterdir()) if path.name not in (SOURCE, CARD)}
    values = {**values, "files": files}
    text = json.dumps({**values, OWN_DIGEST: digest_values(values)}, indent=2, ensure_ascii=False)
    (folder / SOURCE).write_text(text, encoding="utf-8")


def read_source(folder: Path, *, digest: bool = True) -> dict[str, Any] | None:
    """The contents of `exported_from.json` without its digest; None where there is none.

    Args:
        digest: check them against that digest.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / SOURCE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        recorded = values.pop(OWN_DIGEST, None)
        files = values.get("files", {})
        if digest and recorded is not None and recorded != digest_values(values):
            raise ValueError("it has changed since it was written (its digest differs)")
        for name, entry in files.items():
            named_file(path, name)
            entry.keys()
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Export again") from error
    return values


def check_export(folder: Path, *, whole: bool = False) -> None:
    """Compare the files of an export with its digests; a folder without digests passes.

    Args:
        whole: all files. Else those that nobody writes by hand: weights, their index, the vocabulary.

    Raises:
        CheckpointError: damaged files, each by name.
    """
    refuse_damage(folder, export_damage(folder, whole=whole))


def export_damage(folder: Path, part: int = 0, parts: int = 1, *, whole: bool = False) -> list[str]:
    """As `check_export`, for every `parts`-th file from number `part` on: one line for each that does not fit.

    Raises:
        CheckpointError: the list of files is damaged.
    """
    files = (read_source(folder) or {}).get("files", {})
    names = sorted(name for name in files if whole or name.endswith(_MACHINE_MADE))[part::parts]
    return [problem for name in names if (problem := differs(folder / SOURCE, name, files[name]))]


def refuse_damage(folder: Path, problems: list[str]) -> None:
    """Raise CheckpointError if there are problems."""
    if problems:
        raise CheckpointError(
            f"{folder} is damaged: {'; '.join(problems)}. Export again. If you changed the files on purpose, skip the "
            f"digests with --no-verify (in training: checkpoint.verify=false)"
        )
