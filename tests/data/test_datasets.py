from __future__ import annotations

import fcntl
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import run_ranks

from moba_megatron.config import Config, ConfigError, config_from_dict
from moba_megatron.corpus.manifest import load_manifest
from moba_megatron.corpus.tokenizer import Tokenizer, train_bpe
from moba_megatron.data.datasets import (
    INDEX_CACHE,
    build_datasets,
    build_validation,
    check_data,
    check_validation,
)
from moba_megatron.data.index_cache import index_lines


def make_config(folder: Path, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
        "attention": {"block_size": 16},
        "data": {
            "train": str(folder / "train"),
            "validation": str(folder / "validation"),
            "tokenizer": str(folder / "tokenizer"),
            "sequence_length": 64,
        },
        "training": {"steps": 10, "global_batch_size": 8},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"samples": 4, "position_buckets": 4},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return config_from_dict(values)


@pytest.fixture
def own(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may change."""
    return Path(shutil.copytree(dataset, tmp_path / "own", ignore=shutil.ignore_patterns(INDEX_CACHE)))


def tokens_of(dataset: Any, numbers: range | list[int]) -> list[list[int]]:
    return [dataset[number]["tokens"].tolist() for number in numbers]


def test_samples_are_pieces_of_the_stream_of_documents(own: Path):
    config = make_config(own, training__steps=3)
    train, validation = build_datasets(config)
    stream = np.fromfile(own / "train.bin", np.uint16)
    eod = Tokenizer(own / "tokenizer").eod_id
    documents = {tuple(part) for part in np.split(stream, np.flatnonzero(stream == eod) + 1)}
    assert len(train) >= 3 * 8
    for number in range(24):
        sample = train[number]
        assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids", "cu_seqlens"}
        tokens, labels = sample["tokens"], sample["labels"]
        assert tokens.shape == labels.shape == (64,)
        assert tokens[1:].equal(labels[:-1])
        assert sample["loss_mask"].equal((tokens != eod).float())
        # What lies between two ends of documents is a whole document.
        pieces = np.split(tokens.numpy(), np.flatnonzero(tokens.numpy() == eod) + 1)
        assert all(tuple(piece) in documents for piece in pieces[1:-1])
        assert sample["cu_seqlens"].tolist() == [0, *np.cumsum([len(piece) for piece in pieces if len(piece)])]
    assert len(validation) >= 4
    kept = build_datasets(make_config(own, data__cross_document_attention=True))[0]
    assert all(kept[number]["loss_mask"].min() == 1 and "cu_seqlens" not in kept[number] for number in range(24))
    assert tokens_of(kept, range(24)) == tokens_of(train, range(24))


def test_order_follows_from_seed_and_steps_and_validation_from_nothing(own: Path):
    train, validation = build_datasets(make_config(own))
    again, other_seed = (build_datasets(make_config(own, run__seed=seed)) for seed in (1234, 1))
    assert tokens_of(again[0], range(80)) == tokens_of(train, range(80))
    assert tokens_of(other_seed[0], range(80)) != tokens_of(train, range(80))
    longer = build_datasets(make_config(own, training__steps=500, evaluation__samples=9))
    for other in (other_seed, longer):
        assert tokens_of(other[1], range(4)) == tokens_of(validation, range(4))
    assert (own / INDEX_CACHE).is_dir()
    assert build_datasets(make_config(own, data__validation=None))[1] is None


def test_two_ranks_see_the_dataset_of_one_process(own: Path):
    config = make_config(own)

    def read() -> list[list[int]]:
        return [row for dataset in build_datasets(config) for row in tokens_of(dataset, range(4))]

    together = run_ranks(2, read)
    shutil.rmtree(own / INDEX_CACHE)
    assert together == [read(), read()]


def test_blends_mix_by_weight(own: Path, tmp_path: Path):
    second = Path(shutil.copytree(own, tmp_path / "second"))
    ids = np.fromfile(second / "train.bin", np.uint16)
    eod = Tokenizer(own / "tokenizer").eod_id
    np.where(ids == eod, ids, 7).astype(np.uint16).tofile(second / "train.bin")
    blend = [{"path": str(own / "train"), "weight": 3.0}, {"path": str(second / "train"), "weight": 1.0}]
    config = make_config(own, data__train=blend)
    assert check_data(config).train_tokens == 2 * load_manifest(own).splits["train"].tokens
    rows = tokens_of(build_datasets(config)[0], range(80))
    assert sum(set(row) <= {7, eod} for row in rows) == 20
    assert run_ranks(1, lambda: tokens_of(build_datasets(config)[0], range(80))) == [rows]


def test_data_made_anew_does_not_meet_the_old_index(own: Path):
    config = make_config(own)
    old = tokens_of(build_datasets(config)[0], range(8))
    eod = Tokenizer(own / "tokenizer").eod_id
    documents = np.fromfile(own / "train.bin", np.uint16)
    shifted = np.where(documents == eod, documents, np.maximum(documents, 1) % 399 + 1).astype(np.uint16)
    shifted.tofile(own / "train.bin")
    entries = len(list((own / INDEX_CACHE).iterdir()))
    assert tokens_of(build_datasets(config)[0], range(8)) != old
    assert len(list((own / INDEX_CACHE).iterdir())) > entries


def test_an_index_left_half_written_is_made_again(own: Path):
    config = make_config(own)
    rows = tokens_of(build_datasets(config)[0], range(80))
    for path in (own / INDEX_CACHE).glob("*shuffle_index.npy"):
        path.write_bytes(path.read_bytes()[:-4])
    next((own / INDEX_CACHE).glob("*train-sample_index.npy")).write_bytes(b"")
    assert tokens_of(build_datasets(config)[0], range(80)) == rows


def test_indices_lie_where_they_can_be_written(own: Path, tmp_path: Path):
    rows = tokens_of(build_datasets(make_config(own))[0], range(8))
    named = make_config(own, data__index_cache=str(tmp_path / "named/cache"))
    assert tokens_of(build_datasets(named)[0], range(8)) == rows
    assert list((tmp_path / "named/cache").glob("*.npy"))
    # A file in the way stands for a folder that one may only read: root may write anywhere.
    shutil.rmtree(own / INDEX_CACHE)
    (own / INDEX_CACHE).write_text("")
    assert index_lines(named) == []
    fallen = make_config(own, run__dir=str(tmp_path / "run"))
    assert index_lines(fallen) == [
        f"data.index_cache: {tmp_path}/run/index_cache (the folder of data.{key} is not writable)"
        for key in ("train", "validation")
    ]
    assert tokens_of(build_datasets(fallen)[0], range(8)) == rows
    assert list((tmp_path / "run/index_cache").glob("*.npy"))


def test_indices_that_can_be_written_nowhere_are_refused(own: Path):
    shutil.rmtree(own / INDEX_CACHE, ignore_errors=True)
    (own / INDEX_CACHE).write_text("")
    with pytest.raises(ConfigError, match=r"data.index_cache = .*/index_cache is not writable: set data.index_cache"):
        check_data(make_config(own, data__index_cache=str(own / INDEX_CACHE)))
    with pytest.raises(ConfigError, match=r"data.train: neither .* nor .* is writable: set data.index_cache"):
        check_data(make_config(own, run__dir=str(own / INDEX_CACHE / "run")))


def test_an_index_that_another_run_is_writing_is_left_alone(own: Path):
    config, cache, built = make_config(own), own / INDEX_CACHE, []
    rows = tokens_of(build_datasets(config)[0], range(80))
    (path,) = cache.glob("*train-shuffle_index.npy")
    whole = path.read_bytes()
    with open(cache / "lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path.write_bytes(whole[:-4])
        builder = threading.Thread(target=lambda: built.append(build_datasets(config)), daemon=True)
        builder.start()
        builder.join(0.5)
        assert builder.is_alive() and path.read_bytes() == whole[:-4]
        stamp = path.write_bytes(whole) and path.stat().st_mtime_ns
    builder.join(30)
    assert tokens_of(built[0][0], range(80)) == rows
    assert path.stat().st_mtime_ns == stamp


def test_evaluation_needs_the_validation_data_alone(own: Path, tmp_path: Path):
    rows = tokens_of(build_datasets(make_config(own))[1], range(4))
    apart = tmp_path / "apart"
    shutil.copytree(own, apart, ignore=shutil.ignore_patterns(INDEX_CACHE, "train.*"))
    config = make_config(own, data__validation=str(apart / "validation"), data__train=str(tmp_path / "gone" / "train"))
    summary, manifest = check_validation(config), load_manifest(own)
    assert (summary.vocab_size, summary.eod_id) == (400, 0)
    assert summary.validation_tokens == manifest.splits["validation"].tokens
    assert set(summary.identity) == {"tokenizer", "validation"}
    assert summary.identity["tokenizer"] == manifest.tokenizer.fingerprint
    assert tokens_of(build_validation(config), range(4)) == rows
    assert list((apart / INDEX_CACHE).glob("*valid*.npy")) and not (tmp_path / "gone").exists()
    assert build_validation(make_config(own, data__validation=None)) is None


def test_check_validation_refuses_what_cannot_work(own: Path, texts: list[str], tmp_path: Path):
    other = train_bpe(texts, 300, tmp_path / "other")
    for changes, message in (
        ({"data__validation": None}, "data.validation is not set"),
        ({"data__validation": str(own / "nothing")}, "data.validation = .*nothing: missing"),
        ({"data__tokenizer": str(other.folder)}, "data.validation = .* was made with another tokenizer"),
        ({"evaluation__samples": 1000}, "but 1000 are needed: lower evaluation.samples"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            check_validation(make_config(own, **changes))
        assert len(caught.value.problems) == 1


def test_check_data_sums_up(own: Path):
    manifest, config = load_manifest(own), make_config(own)
    summary = check_data(config)
    tokens = manifest.splits["train"].tokens
    assert (summary.vocab_size, summary.eod_id) == (400, 0)
    assert (summary.train_tokens, summary.validation_tokens) == (tokens, manifest.splits["validation"].tokens)
    assert summary.epochs == pytest.approx(10 * 8 * 64 / tokens)
    assert set(summary.identity) == {"tokenizer", "train"}
    assert summary.identity["tokenizer"] == manifest.tokenizer.fingerprint
    changes = make_config(own, run__seed=1, training__steps=500, data__validation=None)
    assert check_data(changes).identity == summary.identity
    ids = np.fromfile(own / "train.bin", np.uint16)
    ids[5] += 1
    ids.tofile(own / "train.bin")
    assert check_data(config).identity["train"] != summary.identity["train"]


def test_check_data_refuses_what_cannot_work(own: Path, texts: list[str], tmp_path: Path):
    other = train_bpe(texts, 300, tmp_path / "other")
    tokens = load_manifest(own).splits["validation"].tokens
    for changes, message in (
        ({"data__train": str(own / "nothing")}, r"data.train = .*nothing: missing .*nothing.bin and .*nothing.idx"),
        ({"data__tokenizer": str(tmp_path)}, r"data.tokenizer = .*needs a tokenizer.json"),
        (
            {"data__tokenizer": str(other.folder)},
            rf"another tokenizer \(fingerprint .*\({other.fingerprint}\): use .*own/tok",
        ),
        ({"model__vocab_size": 399}, "model.vocab_size = 399 is below the 400 entries"),
        ({"data__sequence_length": 10**6}, "0 samples of data.sequence_length = 1000000 .* but 1 are needed"),
        (
            {"evaluation__samples": 1000},
            f"holds {tokens} tokens, {(tokens - 1) // 64} samples .* lower evaluation.samples",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            check_data(make_config(own, **changes))


def test_check_data_names_every_damaged_file(own: Path):
    for split in ("train", "validation"):
        path = own / f"{split}.bin"
        path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ConfigError, match="cut short") as caught:
        check_data(make_config(own))
    assert len(caught.value.problems) == 2
    (own / "train.idx").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="train.idx is not an index"):
        check_data(make_config(own))


def test_data_without_manifest_is_taken_with_a_warning(own: Path, caplog: pytest.LogCaptureFixture):
    (own / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        check_data(make_config(own))
    assert "train has no manifest" in caplog.text
    ids = np.fromfile(own / "train.bin", np.uint16)
    ids[5] = 400
    ids.tofile(own / "train.bin")
    with pytest.raises(ConfigError, match="holds id 400, over the 400 entries"):
        check_data(make_config(own))
    (own / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a manifest of this version"):
        check_data(make_config(own))
