from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from prepare_examples import changed

from moba_megatron.corpus import duplicates as duplicates_module
from moba_megatron.corpus.duplicates import find_duplicates
from moba_megatron.corpus.prepare import prepare
from moba_megatron.corpus.recipe import Recipe
from moba_megatron.corpus.shards import RECORD


@pytest.mark.parametrize("bucket_records", [2**21, 64])
def test_the_first_of_equal_hashes_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket_records: int):
    monkeypatch.setattr(duplicates_module, "_BUCKET_RECORDS", bucket_records)
    monkeypatch.setattr(duplicates_module, "_CHUNK_BYTES", 7 * RECORD.itemsize)
    random.seed(0)
    hashes, shards, sizes = [random.randrange(300) for _ in range(1000)], [], [0, 311, 0, 1, 688]
    for number, stop in enumerate(np.cumsum(sizes)):
        own = hashes[stop - sizes[number] : stop]
        records = np.zeros(len(own), RECORD)
        # Equal in one half only must not be equal.
        records["hash"] = np.array([(value // 7, value) for value in own], np.uint64).reshape(-1, 2)
        shards.append(tmp_path / f"{number}")
        shards[-1].mkdir()
        (shards[-1] / "documents").write_bytes(records.tobytes())
    found = find_duplicates(shards, tmp_path / "work")
    first = {value: hashes.index(value) for value in set(hashes)}
    expected = [(n, first[value]) for n, value in enumerate(hashes) if first[value] != n]
    assert found.total == len(expected) and found.listed == expected
    for shard, start, count in ((1, 0, 311), (4, 5, 100), (4, 500, 188), (3, 0, 1)):
        document = sum(sizes[:shard]) + start
        kept = found.kept(shard, np.zeros(count, RECORD), start)
        assert kept.tolist() == [first[hashes[n]] == n for n in range(document, document + count)]


def test_duplicates_are_dropped_counted_and_named(recipe: Recipe, texts: list[str], tmp_path: Path):
    # Over files, kinds of sources and both splits; the file before is read first.
    once = [f"{text} {number}" for number, text in enumerate(texts[:40])]
    again = [*once[:5], "only here", once[3], *once[30:]]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate([once[7], "another", once[39]]):
        (folder / f"{number}.txt").write_text(text)
    sources = []
    for name, rows in (("a", once), ("b", again)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
        sources.append({"kind": "jsonl", "path": str(tmp_path / f"{name}.jsonl")})
    sources.append({"kind": "files", "path": str(folder)})
    drop = changed(recipe, sources=sources, filters={"exact_duplicates": "drop"})
    manifest = prepare(drop, tmp_path / "dropped", workers=1)

    unique = [*once, "only here", "another"]
    assert sum(split.documents for split in manifest.splits.values()) == len(unique)
    assert sum(split.characters for split in manifest.splits.values()) == sum(map(len, unique))
    assert sum(split.bytes for split in manifest.splits.values()) == sum(len(text.encode()) for text in unique)
    assert [source.documents for source in manifest.sources] == [len(once), 1, 1]
    assert sum(source.bytes for source in manifest.sources) == sum(len(text.encode()) for text in unique)
    assert manifest.duplicates_total == len(again) - 1 + 2 == len(manifest.duplicates)
    assert (manifest.duplicates[0].name, manifest.duplicates[0].first) == (
        f"{tmp_path}/b.jsonl:line 1",
        f"{tmp_path}/a.jsonl:line 1",
    )
    assert (manifest.duplicates[-1].name, manifest.duplicates[-1].first) == ("2.txt", f"{tmp_path}/a.jsonl:line 40")

    # The bytes are those of the same text without its repetitions.
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "only here"}) + "\n")
    for number in (0, 2):
        (folder / f"{number}.txt").unlink()
    prepare(changed(recipe, sources=sources), tmp_path / "unique", workers=1)
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx"):
        assert (tmp_path / "dropped" / name).read_bytes() == (tmp_path / "unique" / name).read_bytes()
    assert prepare(drop, tmp_path / "kept", workers=1).duplicates_total == 0


def test_a_split_of_duplicates_alone_is_an_error(recipe: Recipe, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the same"}\n')
    sources = [{"kind": "jsonl", "path": str(path), "split": split} for split in ("train", "validation")]
    own = changed(recipe, sources=sources, filters={"exact_duplicates": "drop"})
    with pytest.raises(ValueError, match="all documents of validation are duplicates"):
        prepare(own, tmp_path / "out", workers=1)
