"""Where the results of evaluations go: a file in `RUN/evaluation/`, a line in `RUN/evaluations.jsonl`, and the trackers
that the run has switched on.

Training writes lines to `evaluations.jsonl` too, without `kind`. The lines of `moba-megatron evaluate` say what they
are: `kind` and `attention`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moba_megatron.config import Config
from moba_megatron.runs.files import append_json_line, write_whole
from moba_megatron.runs.folder import RunFolder
from moba_megatron.runs.trackers import Trackers, check_trackers


class EvaluationRecords:
    """Writes results of one model; a context manager.

    Args:
        folder: the run folder, or the folder of a model that no run is around.
        config: the run's configuration, for its trackers; None: no trackers. They are left alone too where the folder
            is not that of a run.
        writes: False on the ranks of an evaluation that keep no records.

    Raises:
        ValueError: the run has a tracker on that is not installed here.

    Example:
        with EvaluationRecords(subject.folder, subject.config) as records:
            records.write("tasks", step=100, tokens=204800, attention="moba", values={...}, summary={"accuracy": 0.9})
    """

    def __init__(self, folder: RunFolder, config: Config | None = None, *, writes: bool = True):
        self.folder, self.writes = folder, writes
        self.config = config if self.folder.config.is_file() else None
        self._trackers: Trackers | None = None
        if self.config:
            check_trackers(self.config.logging)

    def __enter__(self) -> EvaluationRecords:
        return self

    def __exit__(self, *_: object) -> None:
        if self._trackers:
            self._trackers.close()

    def write(
        self,
        kind: str,
        *,
        step: int | None,
        tokens: int | None,
        attention: str,
        values: dict[str, Any],
        summary: dict[str, Any],
        name: str | None = None,
    ) -> Path:
        """Keep one result.

        Args:
            kind: what was evaluated: `losses`, `routing`, `tasks`, `lm_eval`, ...
            step, tokens: of training, at the model's checkpoint; None for a model without a known history.
            attention: `moba` or `full`, as the model attended.
            values: everything, JSON-ready; goes to the file.
            summary: what the line in `evaluations.jsonl` says, beside all that and the name of the `file`; its numbers
                become curves of the trackers.
            name: of the file, without `.json`. Default: KIND_step_N_ATTENTION. An older file of this name is replaced:
                the line stays.

        Returns:
            The file.
        """
        head = {"step": step, "tokens": tokens, "kind": kind, "attention": attention}
        assert self.writes, "only the rank that keeps the records writes them"
        path = self.path_of(kind, step, attention, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**head, **values}, indent=1, default=str) + "\n")
        append_json_line(self.folder.evaluations, {**head, "file": path.name, **summary})
        if self.config and step is not None:
            curves = "/".join([kind, attention, *([summary["choice"]] if "choice" in summary else [])])
            self._open_trackers(self.config).track(summary, curves, step)
        return path

    def path_of(self, kind: str, step: int | None, attention: str, name: str | None = None) -> Path:
        """The file of a result, arguments as for `write`."""
        return self.folder.evaluation / f"{name or _name(kind, step, attention)}.json"

    def _open_trackers(self, config: Config) -> Trackers:
        if self._trackers is None:
            settings = config.model_dump(mode="json")
            self._trackers = Trackers(self.folder, config.logging, settings, evaluation=True)
        return self._trackers


def _name(kind: str, step: int | None, attention: str) -> str:
    return f"{kind}_{'' if step is None else f'step_{step}_'}{attention}"
