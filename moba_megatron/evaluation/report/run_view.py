"""Everything a run folder says of its run, read at one moment: of a run that works, that has stopped, or that failed.

Nothing needs to be there but the folder: what is missing is None or empty.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moba_megatron.checkpoint.manifest import CheckpointError, Manifest, find_latest
from moba_megatron.config.reading import read_plain_yaml, text_of
from moba_megatron.runs.files import read_json, read_json_lines
from moba_megatron.runs.folder import RunFolder, trained_steps, training_records
from moba_megatron.runs.starts import layout_changes

# Of one run's steps; more make no difference to a picture and a lot to its size.
MOST_POINTS = 2000
RECENT = 20


@dataclass
class RunView:
    """One run, as its folder shows it.

    Attributes:
        name: to tell it from others on one page.
        status: `status.json`, empty if there is none.
        config_text, config: `config.yaml`, and its values.
        steps: lines of `metrics.jsonl`.
        evaluations: lines of `evaluations.jsonl`.
        environment: `environment.json` and the versions that the newest checkpoint names.
        layouts: changes of the layout between parts of the run, see `layout_changes`.
    """

    name: str
    folder: RunFolder
    status: dict[str, Any]
    config_text: str
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    environment: dict[str, Any]
    layouts: list[tuple[int, dict[str, tuple[Any, Any]]]]

    @property
    def validation(self) -> list[dict[str, Any]]:
        """The evaluations that training made."""
        return training_records(self.evaluations)

    def latest(self, kind: str) -> list[dict[str, Any]]:
        """One line of a kind of evaluation for each attention, of the last step that has any: the values of all its
        lines, the newest of each. Lines on sizes that are not the model's own (`choice`) serve where there are no
        others."""
        lines = [line for line in self.evaluations if line.get("kind") == kind]
        lines = [line for line in lines if "choice" not in line] or lines[-1:]
        last = max((line["step"] for line in lines), key=lambda step: step or 0, default=None)
        merged: dict[str, dict[str, Any]] = {}
        for line in lines:
            if line["step"] == last:
                merged[line["attention"]] = {**merged.get(line["attention"], {}), **line}
        return list(merged.values())

    def kinds(self) -> list[str]:
        """Kinds of evaluations after training, in the order of their first appearance."""
        return list(dict.fromkeys(line["kind"] for line in self.evaluations if "kind" in line))

    def recorded(self, line: dict[str, Any]) -> dict[str, Any] | None:
        """The whole record of the evaluation that a line speaks of, if its file is still there."""
        return read_json(self.folder.evaluation / line["file"])

    def thinned_steps(self) -> list[dict[str, Any]]:
        """At most `MOST_POINTS` steps, evenly spread, the last one among them."""
        every = -(-len(self.steps) // MOST_POINTS) or 1
        return self.steps[::-1][::every][::-1]

    def state(self) -> str:
        """How the run stands, in a few words."""
        if not self.status:
            return "no status: the folder holds no run that got as far as its first step"
        words = f"{self.status['state']} after step {self.status.get('step') or 0}"
        if self.status["state"] == "running":
            done = self.steps[-1]["step"] if self.steps else 0
            words = f"running, {done} steps on disk"
        total = self.config.get("training", {}).get("steps")
        reason = self.status.get("signal") or self.status.get("error")
        return words + (f" of {total}" if total else "") + (f": {reason}" if reason else "")

    def numbers(self) -> list[tuple[str, str]]:
        """The run in a few lines."""
        rows = [("state", self.state())]
        if self.steps:
            recent, last = self.steps[-RECENT:], self.steps[-1]
            rows += [
                ("tokens", f"{last['tokens']:,}"),
                (f"training loss (last {len(recent)} steps)", f"{statistics.fmean(s['loss'] for s in recent):.4f}"),
            ]
            for key in ("balance_loss", "z_loss"):
                if key in last:
                    mean = statistics.fmean(step[key] for step in recent if key in step)
                    rows.append((f"{key.replace('_', ' ')} of the experts (last {len(recent)} steps)", f"{mean:.4f}"))
        if self.validation:
            line = self.validation[-1]
            rows.append((f"validation loss (step {line['step']})", f"{line['loss']:.4f}"))
            if line["trailing_loss"] is not None:
                rows.append((f"last {line['trailing_tokens']} positions", f"{line['trailing_loss']:.4f}"))
        return rows

    def throughput(self) -> list[tuple[str, str]]:
        """Speed, and where the time of a step goes; medians over all steps but the first, which warms up."""
        if not self.steps:
            return []
        steps = self.steps[1:] or self.steps

        def median(key: str) -> float:
            return statistics.median(step[key] for step in steps if key in step)

        whole = median("step_seconds")
        rows = [
            ("tokens per second (median)", f"{median('tokens_per_second'):,.0f}"),
            ("seconds a step (median)", f"{whole:.3f}"),
        ]
        for key in ("forward_backward_seconds", "optimizer_seconds"):
            if key in steps[-1]:
                rows.append((f"of it {key.removesuffix('_seconds').replace('_', ' and ')}", f"{median(key):.3f}"))
        for key, form in (("tflops", ".1f"), ("mfu", ".1%"), ("context_bytes", ",.0f"), ("dispatch_load", ".2f")):
            if key in steps[-1]:
                rows.append((key, format(median(key), form)))
        if "peak_memory_bytes" in steps[-1]:
            rows.append(("peak memory", f"{steps[-1]['peak_memory_bytes'] / 2**30:.1f} GiB"))
        hours = sum(step["step_seconds"] for step in self.steps) / 3600
        return [*rows, ("hours in steps", f"{hours:.2f}")]


def view_run(folder: Path) -> RunView:
    """Read a run folder.

    Raises:
        ValueError: the folder is none, or holds neither a configuration nor records of a run.
    """
    run = RunFolder(folder)
    if not run.config.is_file() and not run.metrics.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no {run.config.name} and no {run.metrics.name}")
    text = text_of(run.config) if run.config.is_file() else ""
    config = read_plain_yaml(run.config) if run.config.is_file() else None
    if not isinstance(config, dict | None):
        raise ValueError(f"{run.config} must hold a mapping of sections: copy it again")
    return RunView(
        name=folder.resolve().name,
        folder=run,
        status=read_json(run.status) or {},
        config_text=text,
        config=config or {},
        steps=trained_steps(read_json_lines(run.metrics, needs=("step", "tokens"))),
        evaluations=read_json_lines(run.evaluations, needs=("step",)),
        environment=_environment(run),
        layouts=layout_changes(run),
    )


def _environment(run: RunFolder) -> dict[str, Any]:
    facts = read_json(run.environment) or {}
    checkpoint = find_latest(run.checkpoints)
    if checkpoint is not None:
        try:
            facts = {**facts, **Manifest.read(checkpoint).versions}
        except CheckpointError as error:
            facts = {**facts, "newest checkpoint": str(error)}
    return facts
