"""megatron-core's GPT datasets for a training configuration.

Sampling, shuffling, epochs and blending are megatron-core's own (`BlendedMegatronDatasetBuilder`, `GPTDataset`):
documents are shuffled, joined, cut into samples of `data.sequence_length` tokens, and the samples shuffled. The order
follows from `run.seed` and `training.steps` x `training.global_batch_size` alone; the number of processes has no part
in it. Validation has a seed of its own that never changes: its first `evaluation.samples` samples are the same in every
evaluation of every run.

megatron-core stores its sample indices in `index_cache/` beside the first file of each split, so that evaluation needs
the validation data alone. Its cache keys know paths and settings but not contents, so a digest of the data is added to
them: data made anew at the same path never meets an old index. Rank 0 cleans up and builds under a file lock, so that
runs on the same data do not meet in half-written files. The folder must be writable by rank 0 and visible to all.

No dense attention mask is ever made; document boundaries come from the tokens, in `batches`.
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
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from moba_megatron.config import BlendEntry, Config, ConfigError
from moba_megatron.data.indexed import read_index
from moba_megatron.data.manifest import load_manifest
from moba_megatron.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

INDEX_CACHE = "index_cache"
_VALIDATION_SEED = 0
_SAMPLED_TOKENS = 2**20


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
    """What the work was done with, to be recorded and compared: `tokenizer` is the tokenizer's fingerprint; `train` (of
    `check_data`) and `validation` (of `check_validation`) are digests of the data, of its first MiB and its size."""


@dataclass(frozen=True, kw_only=True)
class DataSummary(ValidationSummary):
    """What `check_data` found."""

    train_tokens: int
    """Tokens on disk, over all entries of a blend."""
    epochs: float
    """Tokens that the run reads for each token on disk."""


@dataclass(frozen=True)
class DatasetTokenizer:
    """What megatron-core's dataset classes ask of a tokenizer, and what their cache keys must know."""

    vocab_size: int
    eod: int
    fingerprint: str
    data_digest: str
    pad: int = -1
    """No id: nothing in the data is padding."""

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "eod": self.eod, "data": self.data_digest}


def check_data(config: Config) -> DataSummary:
    """Hold the data against the configuration. Cheap: reads indices and manifests, no dataset is built.

    Raises:
        ConfigError: with one line for each file that is missing or damaged, each dataset made with another tokenizer, a
            vocabulary over `model.vocab_size`, and too few tokens.
    """
    tokenizer, tokens = _check_splits(config, ["train", "validation"])
    return DataSummary(
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        train_tokens=tokens["train"],
        validation_tokens=tokens["validation"],
        epochs=config.training.steps * config.tokens_per_step / tokens["train"],
        identity={"tokenizer": tokenizer.fingerprint, "train": _data_digest(_paths(config.data.train))},
    )


def check_validation(config: Config) -> ValidationSummary:
    """Hold the validation data alone against the configuration, as `check_data` does: training data need not be there.

    Raises:
        ConfigError: as `check_data`, and where `data.validation` is not set.
    """
    if config.data.validation is None:
        raise ConfigError(["data.validation is not set: give the prefix of validation data"])
    tokenizer, tokens = _check_splits(config, ["validation"])
    return ValidationSummary(
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        validation_tokens=tokens["validation"],
        identity={"tokenizer": tokenizer.fingerprint, "validation": _data_digest(_paths(config.data.validation))},
    )


def build_datasets(config: Config) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset | None]:
    """(train, validation) as megatron-core datasets; validation is None where `data.validation` is.

    Sample i is a dict of `tokens`, `labels`, `position_ids` [s] int64 and `loss_mask` [s] fp32. Under torch.distributed
    all ranks must call it: rank 0 builds the indices, the others read them.
    """
    train = _build(config, 0, config.training.steps * config.training.global_batch_size, config.run.seed)
    return train, build_validation(config)


def build_validation(config: Config) -> torch.utils.data.Dataset | None:
    """The validation dataset of `build_datasets` alone, the same samples; None where `data.validation` is. Reads no
    training data. Under torch.distributed all ranks must call it."""
    if config.data.validation is None:
        return None
    return _build(config, 1, config.evaluation.samples, _VALIDATION_SEED)


def _build(config: Config, split: int, samples: int, seed: int) -> torch.utils.data.Dataset:
    """One split: 0 is train, 1 is validation, as in megatron-core's lists of three."""
    tokenizer = Tokenizer(config.data.tokenizer)
    entries = _entries(config.data.train if split == 0 else config.data.validation)
    paths = [entry.path for entry in entries]
    blend = (paths, [entry.weight for entry in entries] if len(entries) > 1 else None)
    cache = Path(paths[0]).parent / INDEX_CACHE
    # To cache the order of a blend, megatron-core asks for this process's rank, which there may be none of.
    cached = len(entries) == 1 or torch.distributed.is_initialized()
    dataset_config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=config.data.sequence_length,
        blend_per_split=[blend if number == split else None for number in range(3)],
        path_to_cache=str(cache) if cached else None,
        tokenizer=DatasetTokenizer(tokenizer.vocab_size, tokenizer.eod_id, tokenizer.fingerprint, _data_digest(paths)),
        reset_position_ids=False,
        reset_attention_mask=False,
        # After an end-of-document token comes the first token of another document, which nothing before it announces.
        # Where documents do not see each other it is not predicted; in one stream it is, as in Megatron-LM's default.
        eod_mask_loss=not config.data.cross_document_attention,
        create_attention_mask=False,
    )
    sizes = [samples if number == split else 0 for number in range(3)]
    with _locked(cache):
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, dataset_config).build()[split]


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Rank 0, which writes the indices, waits until no other run does, and first removes files that a killed run left
    half-written: megatron-core would trip over them for ever."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        yield
        return
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in cache.glob("*.npy"):
            try:
                np.load(path, mmap_mode="r")
            except (ValueError, EOFError):
                path.unlink()
        yield


def _entries(blend: str | list[BlendEntry] | None) -> list[BlendEntry]:
    return [BlendEntry(path=blend)] if isinstance(blend, str) else blend or []


def _paths(blend: str | list[BlendEntry] | None) -> list[str]:
    return [entry.path for entry in _entries(blend)]


def _check_splits(config: Config, keys: list[str]) -> tuple[Tokenizer, dict[str, int]]:
    """Check the tokenizer and the data of these splits; return it and the tokens of each."""
    try:
        tokenizer = Tokenizer(config.data.tokenizer)
    except ValueError as error:
        raise ConfigError([f"data.tokenizer = {config.data.tokenizer}: {error}"]) from error
    problems: list[str] = []
    model_size = config.model.vocab_size
    if model_size is not None and tokenizer.vocab_size > model_size:
        problems.append(
            f"model.vocab_size = {model_size} is below the {tokenizer.vocab_size} entries of data.tokenizer"
        )
    tokens = dict.fromkeys(keys, 0)
    for key in keys:
        for entry, samples in _wanted_samples(config, key):
            try:
                tokens[key] += _check_entry(f"data.{key}", entry.path, samples, tokenizer, config)
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    return tokenizer, tokens


def _wanted_samples(config: Config, key: str) -> list[tuple[BlendEntry, int]]:
    """Entries of a split and how many different samples each must hold: one for training, which may repeat its data,
    and its share of `evaluation.samples` for validation, which may not."""
    entries = _entries(getattr(config.data, key))
    if key == "train":
        return [(entry, 1) for entry in entries]
    total = sum(entry.weight for entry in entries)
    return [(entry, math.ceil(config.evaluation.samples * entry.weight / total)) for entry in entries]


def _check_entry(key: str, path: str, samples: int, tokenizer: Tokenizer, config: Config) -> int:
    """Check one dataset; return its tokens."""
    try:
        index = read_index(path)
        manifest = load_manifest(Path(path).parent)
    except ValueError as error:
        raise ValueError(f"{key} = {path}: {error}") from error
    if manifest is None:
        logger.warning("%s = %s has no manifest: that data.tokenizer made it cannot be checked", key, path)
        largest = int(np.fromfile(f"{path}.bin", index.dtype, _SAMPLED_TOKENS).max(initial=0))
        if largest >= tokenizer.vocab_size:
            raise ValueError(
                f"{key} = {path} holds id {largest}, over the {tokenizer.vocab_size} entries of data.tokenizer"
            )
    elif manifest.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{key} = {path} was made with another tokenizer (fingerprint {manifest.tokenizer.fingerprint}) than "
            f"data.tokenizer = {config.data.tokenizer} ({tokenizer.fingerprint}): use "
            f"{Path(path).parent / 'tokenizer'}, or prepare the data again"
        )
    length = config.data.sequence_length
    there = (index.tokens - 1) // length
    if there < samples:
        mend = "evaluation.samples" if key.endswith("validation") else "data.sequence_length"
        raise ValueError(
            f"{key} = {path} holds {index.tokens} tokens, {max(there, 0)} samples of data.sequence_length = {length} "
            f"(and one token more), but {samples} are needed: lower {mend}, or prepare more text"
        )
    return index.tokens


def _data_digest(paths: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        with open(f"{path}.idx", "rb") as file:
            digest.update(file.read(_SAMPLED_TOKENS))
        with open(f"{path}.bin", "rb") as file:
            digest.update(file.read(_SAMPLED_TOKENS))
            digest.update(str(file.seek(0, 2)).encode())
    return digest.hexdigest()
