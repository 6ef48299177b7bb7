"""Where a run is in its data, and where it goes on after a resume.

The order of samples follows from the data, how they are packed, and the seed. While these stay, a resumed run goes on
with the very next sample, on any number of ranks. A run that is resumed with other data, another length or another
packing (which `checkpoint.allow_changed` has to name) gets another order, and starts with its first sample. What
changed then, after which step and sample, stays in the manifest of every later checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from moba_megatron.checkpoint import Manifest
from moba_megatron.config import Config

_KEYS = ("sequence_length", "packing", "min_document_length")


@dataclass(frozen=True)
class DataPosition:
    """What the steps before this one have read.

    step: finished optimizer steps. samples, tokens: what they took.
    order_start: samples that were taken before the present order of samples began.
    changes: each `{"step": int, "consumed_samples": int, "changed": {key: [old value, new value]}}`.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    order_start: int = 0
    changes: tuple[dict[str, Any], ...] = ()

    @property
    def in_order(self) -> int:
        """The next sample's number in the present order."""
        return self.samples - self.order_start

    def order_length(self, config: Config) -> int:
        """Samples of the present order that are taken up to the horizon."""
        return self.in_order + max(config.training.steps - self.step, 0) * config.training.global_batch_size

    def after(self, step: int, config: Config) -> DataPosition:
        """The position after `step`, all steps from here on taken with this configuration."""
        samples = (step - self.step) * config.training.global_batch_size
        return replace(
            self,
            step=step,
            samples=self.samples + samples,
            tokens=self.tokens + samples * config.data.sequence_length,
        )

    def lines(self) -> list[str]:
        """The changes in words, one line each."""
        return [
            f"{key} changed after step {change['step']} (sample {change['consumed_samples']}): {before} became {now}; "
            "its samples are read from the first one"
            for change in self.changes
            for key, (before, now) in change["changed"].items()
        ]


def resumed_position(manifest: Manifest, config: Config, identity: dict[str, str]) -> DataPosition:
    """Where a run goes on that resumes from a checkpoint.

    Args:
        identity: of the data at hand, as `check_data` gives it.
    """
    tokens = manifest.consumed_tokens
    if tokens is None:
        tokens = manifest.consumed_samples * manifest.config["data"]["sequence_length"]
    changes, start = tuple(manifest.data_changes), 0
    changed = _changed(manifest, config, identity)
    if changed:
        changes += ({"step": manifest.step, "consumed_samples": manifest.consumed_samples, "changed": changed},)
    if changes:
        start = changes[-1]["consumed_samples"]
    return DataPosition(manifest.step, manifest.consumed_samples, tokens, start, changes)


def _changed(manifest: Manifest, config: Config, identity: dict[str, str]) -> dict[str, list[Any]]:
    """What decides the order of samples and differs: [old value, new value] by key."""
    before, now = manifest.config["data"], config.model_dump(mode="json")["data"]
    changed = {f"data.{key}": [before.get(key), now[key]] for key in _KEYS if before.get(key, now[key]) != now[key]}
    # The same data may lie elsewhere, and others in the same place: their digest decides.
    if manifest.data.get("train") != identity["train"]:
        names = [f"{json.dumps(data['train'])} (digest {digest})" for data, digest in (
            (before, manifest.data.get("train")), (now, identity["train"]),
        )]  # fmt: skip
        changed["data.train"] = names
    return changed
