"""The export of a checkpoint that stays in its run folder, `RUN/exports/step_N`: made once, used again by whatever
reads Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moba_megatron.checkpoint import CheckpointError
from moba_megatron.convert.export_digests import SOURCE, check_export, read_source
from moba_megatron.convert.export_hf import CONFIG, export_huggingface, source_of
from moba_megatron.convert.exported import Exported
from moba_megatron.runs.folder import RunFolder


def export_in_run(
    exported: Exported,
    run: RunFolder | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
    *,
    verify: bool = True,
) -> Path:
    """The Hugging Face folder of a checkpoint within its run folder; written if it is not there.

    Args:
        run: another folder to keep it in.
        advance, verify: as in `export_huggingface`; the files of an export that is used again are verified likewise.

    Raises:
        CheckpointError: the folder is not an export of this checkpoint by this version, or is damaged. ConfigError,
        CheckpointError: as `export_huggingface`.
    """
    folder = (run or RunFolder.of(exported.checkpoint)).exports / exported.checkpoint.name
    if not folder.exists():
        export_huggingface(exported, folder, advance=advance, verify=verify)
        return folder
    config, wanted = folder / CONFIG, source_of(exported)
    found = _read_again(folder)
    if found == wanted and config.is_file():
        read_source(folder)
        if verify and exported.config.checkpoint.verify:
            check_export(folder, whole=True)
        # Exports of this step once said the length of its sequences, whatever the model was made for.
        key = "max_position_embeddings"
        found, wanted = (
            {**found, key: json.loads(config.read_text(encoding="utf-8"))[key]},
            {**wanted, key: exported.config.window},
        )
    if found != wanted:
        raise CheckpointError(
            f"{folder} is not the export of {exported.checkpoint} ({SOURCE} and {CONFIG} say {found}, expected "
            f"{wanted}): remove the folder; the next call exports again"
        )
    return folder


def _read_again(folder: Path) -> dict[str, Any]:
    """The record of an export's source, without the digests of its files."""
    # An export of another checkpoint is not a damaged one: digests come after.
    found = read_source(folder, digest=False) or {}
    if found and "files" not in found:
        raise CheckpointError(
            f"{folder} was written by an earlier version, without digests of its files: remove the folder, it will be "
            "made anew"
        )
    return {key: value for key, value in found.items() if key != "files"}
