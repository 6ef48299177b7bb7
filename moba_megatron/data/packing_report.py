"""The effect of packing on the data, as text: how full rows are, how many documents are cut. One line a dataset."""

from __future__ import annotations

from typing import Any

from moba_megatron.config import Config
from moba_megatron.corpus.blend import blend_entries
from moba_megatron.corpus.indexed import read_index
from moba_megatron.data.packing import (
    PackingRules,
    PackingSummary,
    pack_documents,
    summarise_concatenation,
    summarise_packing,
)
from moba_megatron.data.packing_datasets import document_lengths


def packing_lines(train: Any, validation: Any = None) -> list[str]:
    """Of the datasets that `build_datasets` made; cheap, but noticeable with very many documents."""
    return [
        f"packing of data.{key} = {part.dataset_path}: {part.summary()}"
        for key, dataset in (("train", train), ("validation", validation))
        if dataset is not None
        for part in getattr(dataset, "datasets", [dataset])
    ]


def expected_packing_lines(config: Config) -> list[str]:
    """The same of the data that a configuration names, without building or writing anything. Missing data gives a line
    with the reason."""
    lines = []
    for key, seed in (("train", config.run.seed), ("validation", 0)):
        try:
            paths = [entry.path for entry in blend_entries(getattr(config.data, key))]
            lines += [f"packing of data.{key} = {path}: {_summary(path, config, seed)}" for path in paths]
        except ValueError as error:
            lines.append(f"packing of data.{key} is not known: {error}")
    return lines


def _summary(path: str, config: Config, seed: int) -> PackingSummary:
    read_index(path)
    lengths = document_lengths(path)
    if config.data.packing == "concatenate":
        return summarise_concatenation(lengths, config.data.sequence_length)
    rules = PackingRules.of(config.data)
    return summarise_packing(lengths, pack_documents(lengths, rules, seed), rules)
