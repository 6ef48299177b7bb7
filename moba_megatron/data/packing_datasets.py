"""megatron-core's GPT dataset, with document boundaries and per-token targets in each sample, for every packing.

A sample is a row of `sequence_length` inputs and one token more, made of *pieces* of documents: (document, first token,
number of tokens). `ConcatenatedRows` takes them from `GPTDataset`'s own indices, which cut a stream of documents.
`PackedRows` has indices of its own (`packing`): whole documents, and every row in a new order in each epoch. Blends,
seeds and the cache of indices are megatron-core's for both.

A token is a target (its prediction counts) with three exceptions: the dataset's loss mask excludes it; it is padding;
or it has no earlier token to predict it from, at the start of a document (if documents do not see each other) or of the
rest of a cut document. Boundaries come from the pieces, so neither padding nor a cut document can be mistaken for an
end. The dense mask over pairs of tokens never exists.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from moba_megatron.config import ConfigError
from moba_megatron.corpus.loss_mask import open_loss_mask
from moba_megatron.data.packing import (
    Packing,
    PackingRules,
    PackingSummary,
    pack_documents,
    row_order,
    summarise_concatenation,
    summarise_packing,
)

_INDICES = ("document_index", "sample_index", "shuffle_index")
_MOST_CHECKED = 1000


@dataclass(frozen=True)
class DatasetTokenizer:
    """The parts of a tokenizer that megatron-core's dataset classes need, and the values for their cache keys."""

    vocab_size: int
    eod: int
    fingerprint: str
    data_digest: str
    pad: int = -1
    """No id: nothing in the data is padding."""

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "eod": self.eod, "data": self.data_digest}


@dataclass
class RowsConfig(GPTDatasetConfig):
    """megatron-core's settings, and ours.

    cross_document_attention: whether a row is one sequence, so that the first token of a document is a target too.
    packing: for `PackedRows`.
    """

    cross_document_attention: bool = False
    packing: PackingRules | None = None


def document_lengths(prefix: str | Path) -> np.ndarray:
    """Tokens of each document of an indexed dataset, [documents] int32."""
    # Its arrays are views of a file that it closes when it goes: keep it until they are copied.
    dataset = IndexedDataset(str(prefix))
    return np.array(dataset.sequence_lengths)


class ConcatenatedRows(GPTDataset):
    """Documents joined and cut by `GPTDataset`, in its order.

    Sample i is a dict of `tokens`, `labels`, `position_ids` [s] int64 and `loss_mask` [s] fp32; where documents do not
    see each other positions start anew at each, and `cu_seqlens` [documents + 1] int32 holds their boundaries. Padding
    at the end of a row is a document of its own; `padding_mask` [s] bool is True there, where rows may have any.
    """

    config: RowsConfig
    may_pad = False

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.targets = open_loss_mask(self.dataset_path)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        pieces, length = self._pieces(number), self.config.sequence_length
        tokens = np.full(length + 1, self.config.tokenizer.eod, np.int64)
        counts = np.zeros(length + 1, np.float32)
        at = 0
        for document, start, size in pieces.tolist():
            tokens[at : at + size] = self.dataset.get(document, start, size)
            counts[at : at + size] = self._counts(document, start, size)
            if start and at:
                # The rest of a cut document goes on from another row, not from the document before it here.
                counts[at] = 0.0
            at += size
        sample = {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": counts[1:]}
        if self.may_pad:
            sample["padding_mask"] = np.arange(length) >= at
        positions = np.arange(length)
        if not self.config.cross_document_attention:
            ends = np.cumsum(pieces[:, 2])
            sample["loss_mask"][ends[ends <= length] - 1] = 0.0
            bounds = np.concatenate([[0], ends[ends < length], [length]])
            positions -= np.repeat(bounds[:-1], np.diff(bounds))
            sample["cu_seqlens"] = bounds.astype(np.int32)
        sample["position_ids"] = positions
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in sample.items()}

    def summary(self) -> PackingSummary:
        """Statistics of one epoch of this dataset."""
        return summarise_concatenation(self.dataset.sequence_lengths, self.config.sequence_length)

    def _pieces(self, number: int) -> np.ndarray:
        """The pieces of a sample, [pieces, 3] int64. Together they are one token longer than the row."""
        row = self.shuffle_index[number]
        (first, start), (last, end) = self.sample_index[row].tolist(), self.sample_index[row + 1].tolist()
        documents = self.document_index[first : last + 1].astype(np.int64)
        starts, ends = np.zeros_like(documents), self.dataset.sequence_lengths[documents].astype(np.int64)
        starts[0], ends[-1] = start, end + 1
        pieces = np.stack([documents, starts, ends - starts], axis=1)
        return pieces[pieces[:, 2] > 0]

    def refuse_foreign(self, number: int) -> None:
        """Raise for a token of a sample outside the vocabulary; the error names the file and the document."""
        entries = self.config.tokenizer.vocab_size
        for document, start, size in self._pieces(number).tolist():
            ids = self.dataset.get(document, start, size)
            wrong = np.flatnonzero((ids >= entries) | (ids < 0))
            if wrong.size:
                raise ConfigError([
                    f"{self.dataset_path}.bin: token {start + wrong[0]} of document {document} is id {ids[wrong[0]]}, "
                    f"but data.tokenizer has {entries} entries: the file is damaged or made with another tokenizer; "
                    f"copy it "
                    "again, or prepare the data again"
                ])  # fmt: skip

    def _counts(self, document: int, start: int, size: int) -> np.ndarray | float:
        if self.targets is None:
            return 1.0
        index = self.dataset.index
        first = int(index.sequence_pointers[document]) // np.dtype(index.dtype).itemsize + start
        return self.targets[first : first + size]


class PackedRows(ConcatenatedRows):
    """Whole documents in rows, as `config.packing` says. Samples as those of `ConcatenatedRows`; rows may end in
    padding."""

    may_pad = True

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "packing"]

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def summary(self) -> PackingSummary:
        packing = Packing(self.document_index, self.sample_index)
        return summarise_packing(self.dataset.sequence_lengths, packing, self.config.packing)

    def _pieces(self, number: int) -> np.ndarray:
        """The pieces of a sample. A piece that fills the row has one token more if its document goes on."""
        row = self.shuffle_index[number]
        pieces = self.document_index[self.sample_index[row] : self.sample_index[row + 1]].astype(np.int64)
        document, start, size = pieces[-1].tolist()
        if size == self.config.sequence_length and start + size < self.dataset.sequence_lengths[document]:
            pieces[-1, 2] += 1
        return pieces

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """megatron-core's place for indices. Here they are the pieces, the first piece of each row, and the row of each
        sample. Rank 0 builds them, the others come after it and read."""
        folder = self.config.path_to_cache
        name = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        paths = [os.path.join(folder or "", f"{name}-{part}.npy") for part in _INDICES]
        builds = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if not folder or (builds and not all(map(os.path.isfile, paths))):
            indices = self._pack()
            if folder:
                with open(os.path.join(folder, f"{name}-description.txt"), "w", encoding="utf-8") as description:
                    description.write(self.unique_description)
                for path, index in zip(paths, indices, strict=True):
                    np.save(path, index)
            return indices
        pieces, rows, order = (np.load(path, mmap_mode="r") for path in paths)
        return pieces, rows, order

    def _pack(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lengths, seed = np.array(self.dataset.sequence_lengths), self.config.random_seed
        packing = pack_documents(lengths, self.config.packing, seed)
        rows = len(packing.rows) - 1
        if not rows:
            raise ValueError(f"{self.dataset_path}: no document is long enough for {self.config.packing}")
        return packing.pieces, packing.rows, row_order(rows, self.num_samples or rows, seed)


class KnownTokens:
    """A dataset of the classes here, or a blend of them. It refuses a sample with an id outside the vocabulary, which
    has no row in the embedding."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.entries = getattr(dataset, "datasets", [dataset])[0].config.tokenizer.vocab_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        sample = self.dataset[number]
        for name in ("tokens", "labels"):
            if int(sample[name].max()) >= self.entries or int(sample[name].min()) < 0:
                part, own = self.dataset, number
                if hasattr(part, "datasets"):
                    part, own = part.datasets[part.dataset_index[number]], int(part.dataset_sample_index[number])
                part.refuse_foreign(own)
        return sample


def check_targets(dataset: torch.utils.data.Dataset, samples: int, key: str) -> None:
    """Look for a token that counts in the first samples, where loss masks decide: a cut may have taken every answer.

    Args:
        dataset: of the classes here, or a blend of them.
        samples: how many will be taken.
        key: the setting that names the data.

    Raises:
        ConfigError: there is none.
    """
    if all(part.targets is None for part in getattr(dataset, "datasets", [dataset])):
        return
    samples = min(samples, len(dataset), _MOST_CHECKED)
    if not any(dataset[number]["loss_mask"].any() for number in range(samples)):
        more = "take more of them (evaluation.samples), " if key == "data.validation" else ""
        raise ConfigError([
            f"{key}: no token of its first {samples} samples counts in the loss: {more}raise data.sequence_length, or "
            "use data.packing: best_fit, so that fewer answers are cut off"
        ])  # fmt: skip
