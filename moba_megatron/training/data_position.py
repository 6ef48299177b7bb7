"""The position of a run in its data, and where it continues after a resume.

The order of samples follows from the data, how they are packed, and the seed. If these stay the same, a resumed run
continues with the very next sample, on any number of ranks. A run that is resumed with other data, another length,
packing or seed (which `checkpoint.allow_changed` has to name) gets another order, and starts with its first sample.
The manifest of every later checkpoint records the change, with its step and sample.

When documents are concatenated, megatron-core shuffles all epochs of a dataset together (the last one separately if
only a small part of it is needed). So another horizon or batch size also changes the order if it changes the epochs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from moba_megatron.checkpoint import Manifest
from moba_megatron.config import Config
from moba_megatron.corpus.blend import blend_entries
from moba_megatron.corpus.indexed import read_index

_KEYS = ("data.sequence_length", "data.packing", "data.min_document_length", "run.seed")
# As megatron-core has them: samples built beyond a dataset's share of a blend, and the share of an epoch from which on
# the last one is shuffled with the others.
_SURPLUS = 0.005
_WHOLE_EPOCH = 0.8


@dataclass(frozen=True)
class DataPosition:
    """The samples that the steps before this one have read.

    step: finished optimizer steps. samples, tokens: what they took.
    order_start: samples that were taken before the present order of samples began.
    changes: each `{"step": int, "consumed_samples": int, "changed": {key: [old value, new value]}}`.
    skipped: batches that a run left out or will leave out, each `{"step": int, "samples": [first, last], "why": str}`.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    order_start: int = 0
    changes: tuple[dict[str, Any], ...] = ()
    skipped: tuple[dict[str, Any], ...] = ()

    @property
    def in_order(self) -> int:
        """The next sample's number in the present order."""
        return self.samples - self.order_start

    def order_length(self, config: Config) -> int:
        """Samples of the present order that are taken up to the horizon."""
        return self.length_with(config.training.steps, config.training.global_batch_size)

    def length_with(self, steps: int, global_batch_size: int) -> int:
        """Samples of the present order that are taken up to step `steps`."""
        return self.in_order + max(steps - self.step, 0) * global_batch_size

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
        """The changes as text, one line each."""
        return [
            f"{key} changed after step {change['step']} (sample {change['consumed_samples']}): {before} became {now}; "
            "the new order starts at its first sample"
            for change in self.changes
            for key, (before, now) in change["changed"].items()
        ]


def resumed_position(manifest: Manifest, config: Config, identity: dict[str, str]) -> DataPosition:
    """Where a run continues that resumes from a checkpoint.

    Args:
        identity: of the data at hand, as `check_data` gives it.
    """
    step, samples, changes = manifest.step, manifest.consumed_samples, tuple(manifest.data_changes)
    start = changes[-1]["consumed_samples"] if changes else 0
    same = DataPosition(step, samples, manifest.tokens, start, changes, tuple(manifest.skipped_batches))
    changed = _changed(manifest, config, identity) or _changed_epochs(same, manifest, config)
    if not changed:
        return _with_the_same_batches(same, config)
    change = {"step": step, "consumed_samples": samples, "changed": changed}
    # What was still to be left out was a batch of the old order.
    done = tuple(entry for entry in same.skipped if entry["step"] <= step)
    return replace(same, order_start=samples, changes=(*changes, change), skipped=done)


def _with_the_same_batches(position: DataPosition, config: Config) -> DataPosition:
    """Batches that are still to be left out are so while a step of that number takes the same samples."""

    def holds(entry: dict[str, Any]) -> bool:
        first = position.after(entry["step"] - 1, config).in_order
        return entry["samples"] == [first, first + config.training.global_batch_size - 1]

    kept = tuple(entry for entry in position.skipped if entry["step"] <= position.step or holds(entry))
    return replace(position, skipped=kept)


def epochs_in_order(config: Config, samples: int) -> list[str]:
    """How megatron-core's `GPTDataset` puts the epochs of each training dataset in order, for concatenated documents.

    Args:
        samples: of the whole order.

    Returns:
        One entry a dataset: `3` if three epochs are shuffled as one, `2 + 1` if the last one is by itself.
    """
    entries = blend_entries(config.data.train)
    total = sum(entry.weight for entry in entries)
    found = []
    for entry in entries:
        share = math.ceil(samples * (entry.weight / total))
        wanted = samples if len(entries) == 1 else math.ceil(share * (1 + _SURPLUS))
        tokens, length = read_index(entry.path).tokens, config.data.sequence_length
        # The last sample has one token more, its last label.
        epochs = max(1, math.ceil((wanted * length + 1) / tokens))
        of_last = wanted - ((epochs - 1) * tokens - 1) // length
        alone = epochs > 1 and of_last < int(_WHOLE_EPOCH * ((tokens - 1) // length))
        found.append(f"{epochs - 1} + 1" if alone else str(epochs))
    return found


def _changed(manifest: Manifest, config: Config, identity: dict[str, str]) -> dict[str, list[Any]]:
    """Differences that change the order of samples: [old value, new value] by key."""
    settings = config.model_dump(mode="json")
    before, now = manifest.config["data"], settings["data"]
    changed = {}
    for name in _KEYS:
        section, key = name.split(".")
        new = settings[section][key]
        old = manifest.config[section].get(key, new)
        if old != new:
            changed[name] = [old, new]
    # The same data may lie elsewhere, and others in the same place: their digest decides.
    if manifest.data.get("train") != identity["train"]:
        names = [f"{json.dumps(data['train'])} (digest {digest})" for data, digest in (
            (before, manifest.data.get("train")), (now, identity["train"]),
        )]  # fmt: skip
        changed["data.train"] = names
    return changed


def _changed_epochs(position: DataPosition, manifest: Manifest, config: Config) -> dict[str, list[Any]]:
    """The epochs that the order holds, where another horizon or batch size changes them."""
    training = manifest.config["training"]
    before, now = position.length_with(training["steps"], training["global_batch_size"]), position.order_length(config)
    if config.data.packing != "concatenate" or before == now:
        return {}
    old, new = (", ".join(epochs_in_order(config, samples)) for samples in (before, now))
    return {"epochs of data.train": [old, new]} if old != new else {}
