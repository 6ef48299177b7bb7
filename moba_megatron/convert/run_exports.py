"""The export of a checkpoint that stays in its run folder, `RUN/exports/step_N`: made once, used again by whatever
reads Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from moba_megatron.checkpoint import CheckpointError
from moba_megatron.convert.export_hf import CONFIG, SOURCE, export_huggingface, source_of
from moba_megatron.convert.exported import Exported
from moba_megatron.runs.folder import RunFolder


def export_in_run(
    exported: Exported, run: RunFolder | None = None, advance: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """The Hugging Face folder of a checkpoint within its run folder; written if it is not there.

    Args:
        run: another folder to keep it in.
        advance: as in `export_huggingface`.

    Raises:
        CheckpointError: the folder there is no export of this checkpoint as this version writes it.
        ConfigError, CheckpointError: as `export_huggingface`.
    """
    folder = (run or RunFolder.of(exported.checkpoint)).exports / exported.checkpoint.name
    if not folder.exists():
        export_huggingface(exported, folder, advance=advance)
        return folder
    path, config = folder / SOURCE, folder / CONFIG
    found, wanted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}, source_of(exported)
    if found == wanted and config.is_file():
        # Exports of this step once said the length of its sequences, whatever the model was made for.
        key = "max_position_embeddings"
        found, wanted = (
            {**found, key: json.loads(config.read_text(encoding="utf-8"))[key]},
            {**wanted, key: exported.config.window},
        )
    if found != wanted:
        raise CheckpointError(
            f"{folder} is not the export of {exported.checkpoint} ({SOURCE} and {CONFIG} say {found}, expected "
            f"{wanted}): remove the folder, it will be made anew"
        )
    return folder
