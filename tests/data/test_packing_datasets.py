"""Samples of every packing: what they hold, what counts in them, and that their order is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from packing_examples import EOD, numbered_stream, packing_config, write_documents

from moba_megatron.config import Config, ConfigError
from moba_megatron.data.batches import microbatches
from moba_megatron.data.datasets import INDEX_CACHE, build_datasets, build_validation, check_data
from moba_megatron.data.packing_report import expected_packing_lines, packing_lines

LENGTHS = np.random.default_rng(0).integers(2, 100, 80).tolist()
STREAM = numbered_stream(LENGTHS)
STARTS = np.cumsum(LENGTHS) - LENGTHS
MASK = np.random.default_rng(1).random(len(STREAM)) < 0.6

PACKINGS = [
    {"data__packing": "concatenate"},
    {"data__packing": "best_fit"},
    {"data__packing": "document", "data__min_document_length": 20},
]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbered")
    write_documents(folder / "train", STREAM, LENGTHS)
    write_documents(folder / "masked", STREAM, LENGTHS, MASK)
    return folder / "train"


def epoch(config: Config) -> list[dict[str, torch.Tensor]]:
    """All samples of one epoch of the training data."""
    rows = build_datasets(config)[0].summary().rows
    dataset = build_datasets(config, rows)[0]
    return [dataset[number] for number in range(rows)]


def targets(samples: list[dict[str, torch.Tensor]], cross: bool) -> list[int]:
    """Places in the stream of all tokens that count, each compared with the token before it."""
    found = []
    for sample in samples:
        tokens, labels, counts = (sample[name].numpy() for name in ("tokens", "labels", "loss_mask"))
        for token, label in zip(tokens[counts == 1], labels[counts == 1], strict=True):
            if token == EOD:
                assert cross and label - 1 in STARTS  # the first token of another document
            else:
                # A token's number is its place + 1, so it is the place of the token after it.
                assert label == STREAM[token]
            found.append(int(token) if token != EOD else int(label) - 1)
    return found


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing["data__packing"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_target_follows_its_own_document_and_the_mask(prefix: Path, packing: dict, cross: bool, masked: bool):
    data = prefix.with_name("masked") if masked else prefix
    config = packing_config(data, data__cross_document_attention=cross, **packing)
    samples = epoch(config)
    found = targets(samples, cross)
    assert len(found) == len(set(found)) > 500
    allowed = {place for place in range(len(STREAM)) if not masked or MASK[place]}
    assert set(found) <= allowed
    if not cross:
        assert not set(found) & set(STARTS.tolist())
        if packing["data__packing"] == "best_fit":
            # Every token but the first of a document is a target exactly once, also where a document was cut.
            assert set(found) == allowed - set(STARTS.tolist())
    may_pad = packing["data__packing"] != "concatenate"
    for sample in samples:
        assert {name: len(values) for name, values in sample.items() if name != "cu_seqlens"} == dict.fromkeys(
            ("tokens", "labels", "loss_mask", "position_ids", *["padding_mask"] * may_pad), 32
        )
        if may_pad:  # at the end of a row, and counted nowhere
            padding = sample["padding_mask"]
            assert not padding[: int((~padding).sum())].any() and not sample["loss_mask"][padding].any()
        if cross:
            assert "cu_seqlens" not in sample and sample["position_ids"].tolist() == list(range(32))


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing["data__packing"])
def test_boundaries_are_those_of_the_documents_and_padding_is_one_of_its_own(prefix: Path, packing: dict):
    padded = 0
    for sample in epoch(packing_config(prefix, **packing)):
        bounds, tokens, positions = (sample[name].numpy() for name in ("cu_seqlens", "tokens", "position_ids"))
        assert (bounds[0], bounds[-1]) == (0, 32) and (np.diff(bounds) > 0).all()
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            piece = tokens[start:end]
            assert positions[start:end].tolist() == list(range(end - start))
            if not sample["loss_mask"][start:end].any() and (piece == EOD).all() and start:
                assert end == 32
                padded += 1
                continue
            # One document: tokens in a row, at most the last one its end.
            inside = piece[:-1] if piece[-1] == EOD else piece
            assert (np.diff(inside) == 1).all() and EOD not in inside
    assert (padded > 0) == (packing["data__packing"] != "concatenate")


def test_an_end_of_document_id_within_a_document_is_no_boundary(tmp_path: Path):
    stream = np.where(np.arange(400) % 7 == 3, EOD, 5)
    write_documents(tmp_path / "train", stream, [10] * 40)
    for packing in ("concatenate", "best_fit"):
        config = packing_config(tmp_path / "train", length=30, data__packing=packing)
        batch = next(
            microbatches(
                build_datasets(config)[0], consumed_samples=0, micro_batch_size=2, data_parallel_rank=0,
                data_parallel_size=1, device="cpu", eod_id=EOD,
            )
        )  # fmt: skip
        lengths = batch["cu_seqlens"].diff()
        assert batch["cu_seqlens"][-1] == 60 and lengths.max() == batch["max_seqlen"] == 10
        assert (lengths == 10).sum() >= 4
        assert packing == "concatenate" or lengths.tolist() == [10] * 6


def test_two_samples_and_padding_make_one_pack(tmp_path: Path):
    write_documents(tmp_path / "train", numbered_stream([20, 9, 25]), [20, 9, 25])
    config = packing_config(tmp_path / "train", length=32, data__packing="best_fit")
    where = {"consumed_samples": 0, "data_parallel_rank": 0, "data_parallel_size": 1, "device": "cpu"}
    batch = next(microbatches(build_datasets(config)[0], micro_batch_size=2, num_samples=2, eod_id=EOD, **where))
    lengths = batch["cu_seqlens"].diff().tolist()
    assert sorted(lengths) == [3, 7, 9, 20, 25] and batch["tokens"].shape == (1, 64)
    assert int(batch["loss_mask"].sum()) == 20 + 9 + 25 - 3
    parts = [
        next(
            microbatches(
                build_datasets(config)[0], micro_batch_size=2, eod_id=EOD, context_rank=r, context_size=2, **where
            )
        )
        for r in range(2)
    ]
    assert parts[0]["cu_seqlens"].tolist() == batch["cu_seqlens"].tolist()
    assert parts[0]["cu_seqlens_padded"].diff().tolist() == [-(-n // 4) * 4 for n in lengths]
    assert sum(int(part["loss_mask"].sum()) for part in parts) == 51


def blend(prefix: Path) -> list[dict[str, Any]]:
    return [{"path": str(prefix), "weight": 1.0}, {"path": str(prefix.with_name("masked")), "weight": 3.0}]


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing["data__packing"])
def test_a_blend_of_data_with_and_without_a_mask(prefix: Path, packing: dict):
    config = packing_config(blend(prefix), training__steps=20, **packing)
    here = build_datasets(config)[0]
    samples = [here[number] for number in range(40)]
    assert [int(sample["dataset_id"]) for sample in samples].count(1) == 30
    for sample in samples:
        allowed = MASK if sample["dataset_id"] == 1 else np.ones_like(MASK)
        assert all(allowed[place] for place in targets([sample], False))
    rows = [sample["tokens"].tolist() for sample in samples]
    assert run_ranks(2, lambda: tokens_of(config, 40)) == [rows, rows]


def tokens_of(config: Config, samples: int) -> list[list[int]]:
    dataset = build_datasets(config)[0]
    return [dataset[number]["tokens"].tolist() for number in range(samples)]


def test_the_order_is_built_once_cached_and_the_same_for_any_number_of_samples(tmp_path: Path):
    write_documents(tmp_path / "train", STREAM, LENGTHS)
    config = packing_config(tmp_path / "train", data__packing="best_fit")
    rows = tokens_of(config, 10)
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / INDEX_CACHE).glob("*PackedRows*.npy")}
    assert len(cached) == 3
    assert tokens_of(config, 10) == rows and run_ranks(2, lambda: tokens_of(config, 10)) == [rows, rows]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in cached.items())
    longer = packing_config(tmp_path / "train", data__packing="best_fit", training__steps=500)
    assert tokens_of(longer, 10) == rows
    other = packing_config(tmp_path / "train", data__packing="best_fit", run__seed=5)
    assert tokens_of(other, 10) != rows
    epoch = build_datasets(config)[0].summary().rows
    assert sorted(tokens_of(longer, 3 * epoch)) == sorted(tokens_of(longer, epoch) * 3)


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing["data__packing"])
def test_what_packing_comes_to_is_told_in_the_same_words_before_and_after(prefix: Path, packing: dict):
    config = packing_config(prefix, **packing)
    lines = packing_lines(*build_datasets(config))
    assert len(lines) == 1 and lines == expected_packing_lines(config)
    assert f"packing of data.train = {prefix}: {packing['data__packing']}, " in lines[0] and "% full" in lines[0]
    gone = expected_packing_lines(packing_config(prefix.with_name("gone"), **packing))
    assert gone[0].startswith("packing of data.train is not known: missing ")


def test_data_that_gives_no_rows_is_refused_before_anything_starts(tmp_path: Path):
    write_documents(tmp_path / "train", numbered_stream([10, 20, 1]), [10, 20, 1])
    write_documents(tmp_path / "ends", numbered_stream([1, 1, 1]), [1, 1, 1])
    with pytest.raises(ConfigError, match=(
        "holds 0 samples of data.sequence_length = 32: 0 of its 3 documents have data.min_document_length = 32 tokens "
        "or more, the longest has 20, but 1 are needed: lower data.min_document_length"
    )):  # fmt: skip
        check_data(packing_config(tmp_path / "train", data__packing="document"))
    with pytest.raises(ConfigError, match="holds 0 tokens in documents of at least two tokens"):
        check_data(packing_config(tmp_path / "ends", data__packing="best_fit"))
    usable = packing_config(tmp_path / "train", data__packing="document", data__min_document_length=15)
    assert check_data(usable).epochs == 10
    held = packing_config(
        tmp_path / "train", data__packing="best_fit", data__validation=str(tmp_path / "train"), evaluation__samples=4
    )
    with pytest.raises(ConfigError, match="1 samples of data.sequence_length = 32, but 4 are needed: lower evaluation"):
        check_data(held)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(30), "loss_mask.bin has 30 bytes, but .*train.bin has 31 tokens, one byte each"),
        (np.full(31, 49), "holds the byte 49: only 0 .* and 1 .* are valid"),
        (np.zeros(31), "is 0 everywhere, so no token would count"),
    ],
    ids=["size", "values", "nothing"],
)
def test_a_mask_that_cannot_be_right_is_refused(tmp_path: Path, mask: np.ndarray, message: str):
    write_documents(tmp_path / "train", numbered_stream([10, 20, 1]), [10, 20, 1], mask)
    with pytest.raises(ConfigError, match=message):
        check_data(packing_config(tmp_path / "train", length=16))


def test_masks_that_leave_nothing_in_the_samples_are_refused(tmp_path: Path):
    """Answers at the end of documents, cut off by rows that are too short for them."""
    mask = np.tile(np.arange(40) >= 36, 3)
    write_documents(tmp_path / "train", numbered_stream([40, 40, 40]), [40, 40, 40], mask)
    cut = packing_config(tmp_path / "train", data__packing="document", data__validation=str(tmp_path / "train"))
    with pytest.raises(ConfigError, match="data.train: no token of its first 10 samples counts in the loss: raise"):
        build_datasets(cut)
    with pytest.raises(ConfigError, match="data.validation: no token of its first 32 .*: take more of them"):
        build_validation(cut)
    assert len(build_datasets(packing_config(tmp_path / "train", data__packing="best_fit"))[0]) == 10


def test_another_mask_and_other_shares_are_other_data(tmp_path: Path):
    stream = STREAM % 100
    write_documents(tmp_path / "train", stream, LENGTHS, MASK)
    before = check_data(packing_config(tmp_path / "train")).identity["train"]
    (~MASK).astype(np.uint8).tofile(tmp_path / "train.loss_mask.bin")
    assert check_data(packing_config(tmp_path / "train")).identity["train"] != before
    write_documents(tmp_path / "other", stream, LENGTHS)
    shares = [
        check_data(packing_config([{"path": str(tmp_path / "train"), "weight": w}, {"path": str(tmp_path / "other")}]))
        for w in (1.0, 2.0)
    ]
    assert shares[0].identity["train"] != shares[1].identity["train"]


def test_a_least_length_without_its_packing_is_refused(prefix: Path):
    with pytest.raises(ConfigError, match="data.min_document_length = 20 has no effect with data.packing = best_fit"):
        packing_config(prefix, data__packing="best_fit", data__min_document_length=20)
