"""megatron-core's GPT datasets for a training configuration.

Blending, caching and, where documents are concatenated, sampling are megatron-core's own
(`BlendedMegatronDatasetBuilder`, `GPTDataset`); `packing_datasets` holds what is ours. The order of samples depends
only on `run.seed` and the number of samples, not on the number of processes. Validation has a fixed seed: its first
`evaluation.samples` samples are the same in every evaluation of every run.

megatron-core stores its sample indices in `data.index_cache`. The default is `index_cache/` beside the first file of
each split, so evaluation needs only the validation data; if that folder is not writable, it is the run folder
(`index_cache`). megatron-core's cache keys depend on paths and settings but not on contents. So a digest of the data is
added to them: new data at the same path never use an old index. Rank 0 cleans up and builds under a file lock, so runs
on the same data never read half-written files. The folder must be writable by rank 0 and visible to all.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from moba_megatron.config import BlendEntry, Config, ConfigError
from moba_megatron.config.paths import counted_from
from moba_megatron.corpus.blend import blend_entries
from moba_megatron.corpus.indexed import IndexSummary, foreign_id, read_index
from moba_megatron.corpus.loss_mask import check_loss_mask, loss_mask_path
from moba_megatron.corpus.manifest import load_manifest
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.data.index_cache import INDEX_CACHE as INDEX_CACHE
from moba_megatron.data.index_cache import check_index_folder, index_folder
from moba_megatron.data.order_memory import order_problem
from moba_megatron.data.packing import PackingRules, usable
from moba_megatron.data.packing_datasets import (
    ConcatenatedRows,
    DatasetTokenizer,
    PackedRows,
    RowsConfig,
    check_targets,
    document_lengths,
)
from moba_megatron.data.trusted import check_once, first_rank, remove_changed

logger = logging.getLogger(__name__)

_VALIDATION_SEED = 0
_SAMPLED_TOKENS = 2**20
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ValidationSummary:
    """What `check_validation` found."""

    vocab_size: int
    """Entries of the tokenizer."""
    eod_id: int
    """The id that ends each document."""
    validation_tokens: int
    """Tokens on disk, over all entries of a blend; 0 without validation data."""
    identity: dict[str, str]
    """The identity of data and tokenizer, to be recorded and compared: `tokenizer` is the tokenizer's fingerprint;
    `train` (of `check_data`) and `validation` (of `check_validation`) are digests of the data, of its first MiB and its
    size, and of the shares of a blend."""


@dataclass(frozen=True, kw_only=True)
class DataSummary(ValidationSummary):
    """What `check_data` found."""

    train_tokens: int
    """Tokens on disk, over all entries of a blend."""
    epochs: float
    """How often the run reads the data."""


def check_data(config: Config) -> DataSummary:
    """Check that the data fit the configuration. Cheap: reads indices and manifests, no dataset is built.

    Raises:
        ConfigError: with one line for each file that is missing or damaged, each dataset made with another tokenizer, a
            vocabulary over `model.vocab_size`, and too few tokens.
    """
    tokenizer, sizes = _check_splits(config, ["train", "validation"])
    return DataSummary(
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        train_tokens=sizes["train"].tokens,
        validation_tokens=sizes["validation"].tokens,
        epochs=config.training.steps * config.training.global_batch_size / sizes["train"].samples_per_epoch,
        identity={"tokenizer": tokenizer.fingerprint, "train": _data_digest(blend_entries(config.data.train))},
    )


def check_validation(config: Config) -> ValidationSummary:
    """Check only the validation data against the configuration, as `check_data` does: training data need not be there.

    Raises:
        ConfigError: as `check_data`, and where `data.validation` is not set.
    """
    if config.data.validation is None:
        raise ConfigError(["data.validation is not set: give the prefix of validation data"])
    tokenizer, sizes = _check_splits(config, ["validation"])
    digest = _data_digest(blend_entries(config.data.validation))
    return ValidationSummary(
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        validation_tokens=sizes["validation"].tokens,
        identity={"tokenizer": tokenizer.fingerprint, "validation": digest},
    )


def training_tokenizer(config: Config) -> Path:
    """Folder of the tokenizer: `data.tokenizer`, or, if that is missing, the copy in the run folder."""
    named, kept = Path(config.data.tokenizer), Path(config.run.dir) / "tokenizer"
    return kept if not named.is_dir() and kept.is_dir() else named


def build_datasets(
    config: Config, train_samples: int | None = None
) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset | None]:
    """(train, validation) as megatron-core datasets; validation is None where `data.validation` is.

    Samples are as in `packing_datasets.ConcatenatedRows`. Under torch.distributed all ranks must call it: rank 0 builds
    the indices, the others read them. Raises ConfigError if loss masks leave nothing that counts.

    Args:
        train_samples: how many the run will take. Default: `training.steps` x `training.global_batch_size`.
    """
    samples = train_samples or config.training.steps * config.training.global_batch_size
    return _build(config, 0, samples, config.run.seed), build_validation(config)


def build_validation(config: Config) -> torch.utils.data.Dataset | None:
    """The validation dataset of `build_datasets` alone, the same samples; None where `data.validation` is. Reads no
    training data. Under torch.distributed all ranks must call it."""
    if config.data.validation is None:
        return None
    return _build(config, 1, config.evaluation.samples, _VALIDATION_SEED)


def _build(config: Config, split: int, samples: int, seed: int) -> torch.utils.data.Dataset:
    """One split: 0 is train, 1 is validation, as in megatron-core's lists of three."""
    tokenizer = Tokenizer(training_tokenizer(config))
    entries = blend_entries(config.data.train if split == 0 else config.data.validation)
    paths, digest = [entry.path for entry in entries], _data_digest(entries)
    blend = (paths, [entry.weight for entry in entries] if len(entries) > 1 else None)
    cache = Path(_agreed(str(index_folder(config, "validation" if split else "train"))))
    # To cache the order of a blend, megatron-core asks for this process's rank, which there may be none of.
    cached = len(entries) == 1 or torch.distributed.is_initialized()
    rows = ConcatenatedRows if config.data.packing == "concatenate" else PackedRows
    dataset_config = RowsConfig(
        random_seed=seed,
        sequence_length=config.data.sequence_length,
        blend_per_split=[blend if number == split else None for number in range(3)],
        path_to_cache=str(cache) if cached else None,
        tokenizer=DatasetTokenizer(tokenizer.vocab_size, tokenizer.eod_id, tokenizer.fingerprint, digest),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        cross_document_attention=config.data.cross_document_attention,
        packing=None if rows is ConcatenatedRows else PackingRules.of(config.data),
    )
    sizes = [samples if number == split else 0 for number in range(3)]
    key = "validation" if split else "train"
    with _locked(cache):
        if first_rank():
            for path in paths:
                check_once(path, load_manifest(Path(path).parent), cache)

        def build() -> Any:
            return BlendedMegatronDatasetBuilder(rows, sizes, lambda: True, dataset_config).build()[split]

        dataset = build()
        if _agreed(remove_changed(dataset, cache) if first_rank() else []):
            dataset = build()
            if first_rank():
                remove_changed(dataset, cache)
    check_targets(dataset, samples, f"data.{key}")
    return dataset


def _agreed(found: T) -> T:
    """What rank 0 found: rights and disks may differ from machine to machine."""
    values = [found]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Rank 0, which writes the indices, waits until no other run does, and first removes files that a killed run left
    half-written: megatron-core would trip over them for ever."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        yield
        return
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in cache.glob("*.npy"):
            try:
                np.load(path, mmap_mode="r")
            except (ValueError, EOFError):
                path.unlink()
        yield


@dataclass
class _Size:
    """Tokens on disk, and the samples that they make."""

    tokens: int = 0
    samples_per_epoch: float = 0.0
    documents: int = 0


def _check_splits(config: Config, keys: list[str]) -> tuple[Tokenizer, dict[str, _Size]]:
    """Check the tokenizer and the data of these splits; return it and the size of each."""
    try:
        tokenizer = Tokenizer(training_tokenizer(config))
    except ValueError as error:
        where = counted_from(config.data.tokenizer)
        raise ConfigError([f"data.tokenizer = {config.data.tokenizer}: {error}{where}"]) from error
    problems: list[str] = []
    model_size = config.model.vocab_size
    if model_size is not None and tokenizer.vocab_size > model_size:
        problems.append(
            f"model.vocab_size = {model_size} is below the {tokenizer.vocab_size} entries of data.tokenizer"
        )
    sizes = {key: _Size() for key in keys}
    for key in keys:
        problems += check_index_folder(config, key)
        for entry, samples in _wanted_samples(config, key):
            try:
                found = _check_entry(f"data.{key}", entry.path, samples, tokenizer, config)
            except ValueError as error:
                problems.append(str(error))
            else:
                sizes[key].tokens += found.tokens
                sizes[key].samples_per_epoch += found.samples_per_epoch
                sizes[key].documents += found.documents
    if not problems and "train" in sizes:
        found = order_problem(config, sizes["train"].documents, sizes["train"].samples_per_epoch)
        problems += [found] if found else []
    if problems:
        raise ConfigError(problems)
    return tokenizer, sizes


def _wanted_samples(config: Config, key: str) -> list[tuple[BlendEntry, int]]:
    """Entries of a split and how many different samples each must hold: one for training, which may repeat its data,
    and its share of `evaluation.samples` for validation, which may not."""
    entries = blend_entries(getattr(config.data, key))
    if key == "train":
        return [(entry, 1) for entry in entries]
    total = sum(entry.weight for entry in entries)
    return [(entry, math.ceil(config.evaluation.samples * entry.weight / total)) for entry in entries]


def _check_entry(key: str, path: str, samples: int, tokenizer: Tokenizer, config: Config) -> _Size:
    """Check one dataset; return its size."""
    try:
        index = read_index(path)
        manifest = load_manifest(Path(path).parent)
        check_once(path, manifest, index_folder(config, key.removeprefix("data.")))
        split = manifest.splits.get(Path(path).name) if manifest else None
        check_loss_mask(path, index.dtype.itemsize, wanted=split is not None and split.target_tokens is not None)
    except ValueError as error:
        raise ValueError(f"{key} = {path}: {error}{counted_from(path)}") from error
    if manifest is None:
        logger.warning("%s = %s has no manifest, so its tokenizer cannot be checked", key, path)
        if wrong := foreign_id(path, tokenizer.vocab_size, _SAMPLED_TOKENS):
            raise ValueError(f"{key} = {path}: {wrong} of data.tokenizer")
    elif manifest.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{key} = {path} was made with another tokenizer (fingerprint {manifest.tokenizer.fingerprint}) than "
            f"data.tokenizer = {config.data.tokenizer} ({tokenizer.fingerprint}): use "
            f"{Path(path).parent / 'tokenizer'}, or prepare the data again"
        )
    there, what = _samples_there(path, index, config)
    if there < samples:
        fix = "data.sequence_length"
        if config.data.packing == "document":
            fix = "data.min_document_length"
        if key.endswith("validation") and there:
            fix = "evaluation.samples"
        raise ValueError(f"{key} = {path} holds {what}, but {samples} are needed: lower {fix}, or prepare more text")
    # Where documents are concatenated, the rest of an epoch begins the next one.
    concatenated = config.data.packing == "concatenate"
    samples_per_epoch = index.tokens / config.data.sequence_length if concatenated else there
    return _Size(index.tokens, samples_per_epoch, index.documents)


def _samples_there(path: str, index: IndexSummary, config: Config) -> tuple[int, str]:
    """The number of different samples that a dataset makes (at least), and its contents as text."""
    length = config.data.sequence_length
    if config.data.packing == "concatenate":
        there = max(index.tokens - 1, 0) // length
        return there, f"{index.tokens} tokens, {there} samples of data.sequence_length = {length} (and one token more)"
    rules, lengths = PackingRules.of(config.data), document_lengths(path)
    tokens, there = usable(lengths, rules)
    text = f"{there} samples of data.sequence_length = {length}"
    if rules.kind == "best_fit":
        return there, f"{tokens} tokens in documents of at least two tokens, {text}"
    return there, (
        f"{text}: {np.count_nonzero(lengths >= rules.min_document_length)} of its {len(lengths)} documents have "
        f"data.min_document_length = {rules.min_document_length} tokens or more, the longest has "
        f"{lengths.max(initial=0)}"
    )


def _data_digest(entries: list[BlendEntry]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for entry in entries:
        with open(f"{entry.path}.idx", "rb") as file:
            digest.update(file.read(_SAMPLED_TOKENS))
        for path in (Path(f"{entry.path}.bin"), loss_mask_path(entry.path)):
            if path.is_file():
                with open(path, "rb") as file:
                    digest.update(file.read(_SAMPLED_TOKENS))
                    digest.update(str(file.seek(0, 2)).encode())
        if len(entries) > 1:
            digest.update(str(entry.weight / sum(e.weight for e in entries)).encode())
    return digest.hexdigest()
