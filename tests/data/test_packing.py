"""Packing as arithmetic: nothing lost, nothing twice, rows full, and fast enough for large data."""

from __future__ import annotations

import doctest
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from moba_megatron.data import packing
from moba_megatron.data.packing import (
    PackingRules,
    best_fit,
    cut_documents,
    pack_documents,
    row_order,
    summarise_concatenation,
    summarise_packing,
    usable,
)


def free_rooms_by_definition(sizes: list[int], row_length: int) -> list[int]:
    """Free room of each row when each piece goes into the fullest row that holds it."""
    rooms: list[int] = []
    for size in sizes:
        fitting = [number for number, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= size
        else:
            rooms.append(row_length - size)
    return sorted(rooms)


def test_best_fit_is_best_fit():
    random = np.random.default_rng(0)
    for _ in range(200):
        row_length = int(random.integers(2, 40))
        sizes = np.sort(random.integers(1, row_length + 1, random.integers(0, 60)))[::-1]
        filled = np.bincount(best_fit(sizes, row_length), sizes).astype(int)
        assert sorted(row_length - filled) == free_rooms_by_definition(sizes.tolist(), row_length)


@pytest.mark.parametrize("rules", [PackingRules("best_fit", 50, 2), PackingRules("document", 50, 20)], ids=str)
def test_every_document_is_there_once_and_only_long_ones_are_cut(rules: PackingRules):
    lengths = np.random.default_rng(1).integers(1, 160, 400)
    packed = pack_documents(lengths, rules, seed=3)
    found = {}
    for document, start, size in packed.pieces.tolist():
        found.setdefault(document, []).append((start, size))
    for document, length in enumerate(lengths.tolist()):
        pieces = sorted(found.get(document, []))
        assert [start for start, _ in pieces] == list(range(0, 50 * len(pieces), 50))
        left_out = length - sum(size for _, size in pieces)
        if length < rules.min_document_length:
            assert not pieces
        else:
            assert all(size == 50 for _, size in pieces[:-1]) and left_out < rules.min_piece
    filled = np.add.reduceat(packed.pieces[:, 2], packed.rows[:-1])
    assert filled.max() <= 50 and packed.rows[-1] == len(packed.pieces)
    tokens, at_least = usable(lengths, rules)
    assert tokens == filled.sum() and at_least <= len(filled)
    if rules.kind == "document":
        assert at_least == len(filled) == len(packed.pieces)


def real_lengths() -> np.ndarray:
    """Lengths of the standard library's sources, four bytes a token."""
    sizes = [path.stat().st_size // 4 for path in Path(sysconfig.get_path("stdlib")).rglob("*.py")]
    return np.array([size for size in sizes if size > 1])


def test_rows_of_real_documents_are_full_and_few_documents_are_cut():
    lengths = real_lengths()
    for row_length in (2048, 8192, 32768):
        rules = PackingRules("best_fit", row_length, 2)
        summary = summarise_packing(lengths, pack_documents(lengths, rules, seed=0), rules)
        joined = summarise_concatenation(lengths, row_length)
        assert summary.fill > 0.99
        assert summary.tokens + summary.tokens_left_out == lengths.sum()
        assert summary.documents_cut == np.count_nonzero(lengths > row_length) < joined.documents_cut


def test_the_expected_number_of_cut_documents_is_what_a_cut_stream_has():
    lengths = np.random.default_rng(2).integers(2, 300, 3000)
    ends = np.cumsum(np.random.default_rng(3).permutation(lengths))
    cut = np.count_nonzero((ends - 1) // 128 > np.append(0, ends[:-1]) // 128)
    assert summarise_concatenation(lengths, 128).documents_cut == pytest.approx(cut, rel=0.03)
    assert summarise_concatenation(np.array([100, 128, 191, 256]), 128).rows_of_one_document == (1 + 64 + 129) / 128


def test_three_hundred_thousand_documents_take_about_a_second():
    lengths = np.random.default_rng(4).choice(real_lengths(), 300_000)
    start = time.process_time()
    packed = pack_documents(lengths, PackingRules("best_fit", 32768, 2), seed=0)
    # The bound leaves room for a busy machine; anything quadratic takes minutes.
    assert time.process_time() - start < 5
    assert len(packed.pieces) >= 300_000


def test_rows_follow_from_lengths_and_seed():
    lengths, rules = np.random.default_rng(5).integers(2, 9, 300), PackingRules("best_fit", 20, 2)
    one, again, other = (pack_documents(lengths, rules, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.pieces, again.pieces) and np.array_equal(one.rows, again.rows)
    assert not np.array_equal(one.pieces, other.pieces)
    # The longest piece of a row is not always its first.
    firsts = one.pieces[one.rows[:-1], 2]
    longest = np.maximum.reduceat(one.pieces[:, 2], one.rows[:-1])
    assert 0 < np.count_nonzero(firsts < longest) < len(firsts)


def test_each_epoch_has_every_row_once_in_an_order_of_its_own():
    order = row_order(7, 24, seed=1)
    epochs = [order[start : start + 7].tolist() for start in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert row_order(7, 100, seed=1)[:24].tolist() == order.tolist()
    assert row_order(7, 24, seed=2).tolist() != order.tolist()


def test_pieces_of_one_token_are_left_out():
    pieces = cut_documents(np.array([1, 8, 9, 10]), PackingRules("best_fit", 8, 2))
    assert pieces.tolist() == [[1, 0, 8], [2, 0, 8], [3, 0, 8], [3, 8, 2]]


def test_a_summary_in_words():
    rules = PackingRules("document", 8, 6)
    text = str(summarise_packing(np.array([6, 20, 3, 1]), pack_documents(np.array([6, 20, 3, 1]), rules, 0), rules))
    assert text == (
        "document, 3 rows of 8 tokens (2 of one document), 91.67% full, 50.0% of 2 documents cut, "
        "26.67% of the tokens left out (2 whole documents)"
    )


def test_examples_in_the_documentation_of_packing():
    assert doctest.testmod(packing, extraglobs={"np": np}).failed == 0
