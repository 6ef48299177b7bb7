from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from prepare_examples import changed, data_bytes, documents_of, stdlib_recipe

from moba_megatron.corpus.documents import Document
from moba_megatron.corpus.encode import choose_split
from moba_megatron.corpus.engines import Encoder, EngineMismatch
from moba_megatron.corpus.indexed import read_index, token_dtype
from moba_megatron.corpus.manifest import load_manifest
from moba_megatron.corpus.prepare import prepare
from moba_megatron.corpus.prepare_plan import plan_preparation
from moba_megatron.corpus.recipe import Recipe, recipe_from_dict
from moba_megatron.corpus.tokenizer import Tokenizer, train_bpe


def test_text_comes_back_document_by_document(recipe: Recipe, dataset: Path):
    tokenizer = Tokenizer(dataset / "tokenizer")
    total = 0
    for split in ("train", "validation"):
        indexed = IndexedDataset(str(dataset / split))
        rows = [np.array(indexed[n]) for n in range(len(indexed))]
        assert all(row[-1] == tokenizer.eod_id for row in rows)
        assert [tokenizer.decode(row[:-1]) for row in rows] == documents_of(recipe, split)
        assert indexed.document_indices.tolist() == list(range(len(rows) + 1))
        total += len(rows)
    assert total == 62


@pytest.mark.parametrize("vocab_size", [400, 70_000])
def test_files_equal_those_of_megatron_cores_builder(
    recipe: Recipe, tokenizer: Tokenizer, tmp_path: Path, vocab_size: int
):
    if vocab_size > tokenizer.vocab_size:
        tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
        wide = Tokenizer(tmp_path)
        wide.backend.add_tokens([f"<extra {n}>" for n in range(vocab_size - tokenizer.vocab_size)])
        wide.backend.save(str(tmp_path / "tokenizer.json"))
        recipe = changed(
            recipe, tokenizer={"kind": "pretrained", "path": str(tmp_path), "end_of_document": "<|endoftext|>"}
        )
    prepare(recipe, tmp_path / "out", workers=1)
    dtype = DType.optimal_dtype(vocab_size)
    assert token_dtype(vocab_size) == dtype
    for split in ("train", "validation"):
        builder = IndexedDatasetBuilder(str(tmp_path / "builder.bin"), dtype=dtype)
        for ids in tokenizer.encode_batch(documents_of(recipe, split)):
            builder.add_document(np.array([*ids, tokenizer.eod_id]), [len(ids) + 1])
        builder.finalize(str(tmp_path / "builder.idx"))
        for ending in (".bin", ".idx"):
            assert (tmp_path / f"out/{split}{ending}").read_bytes() == (tmp_path / f"builder{ending}").read_bytes()


def test_the_manifest_counts_what_is_there(recipe: Recipe, dataset: Path, texts: list[str]):
    manifest = load_manifest(dataset)
    for split, stats in manifest.splits.items():
        documents = documents_of(recipe, split)
        index = read_index(dataset / split)
        assert (stats.documents, stats.tokens) == (index.documents, index.tokens)
        assert stats.documents == len(documents) == sum(bucket.documents for bucket in stats.lengths)
        assert stats.characters == sum(map(len, documents))
        assert stats.bytes == sum(len(text.encode()) for text in documents)
        assert stats.tokens == sum(bucket.tokens for bucket in stats.lengths)
        assert stats.longest == IndexedDataset(str(dataset / split)).sequence_lengths.max()
    assert manifest.sources[0].documents == len(texts)
    assert manifest.sources[0].bytes == sum(len(text.encode()) for text in texts)
    assert manifest.tokenizer.fingerprint == Tokenizer(dataset / "tokenizer").fingerprint
    assert (dataset / "lengths.png").read_bytes().startswith(b"\x89PNG")
    # The unigram loss by its definition.
    train, validation = (np.fromfile(dataset / f"{split}.bin", np.uint16) for split in ("train", "validation"))
    share = (np.bincount(train, minlength=400) + 1) / (train.size + 400)
    assert manifest.unigram_loss == pytest.approx(-np.log(share[validation]).mean(), rel=1e-12)


def test_any_number_of_workers_gives_the_same_bytes(tokenizer: Tokenizer, tmp_path: Path):
    recipe = stdlib_recipe({"kind": "pretrained", "path": str(tokenizer.folder)})
    assert len(plan_preparation(recipe).parts) >= 3
    one, three = (prepare(recipe, tmp_path / str(n), workers=n) for n in (1, 3))
    assert data_bytes(tmp_path / "1") == data_bytes(tmp_path / "3")
    assert one.sources == three.sources and one.splits == three.splits
    assert (one.workers, three.workers) == (1, 3)


def test_a_mismatch_of_engines_starts_again_with_tokenizers(recipe: Recipe, dataset: Path, tmp_path: Path, monkeypatch):
    pytest.importorskip("gigatoken")

    def differ(self: Encoder, texts: list[str]) -> None:
        if self.fast is not None:
            raise EngineMismatch("gigatoken and tokenizers give different ids for 'x'")

    monkeypatch.setattr(Encoder, "check", differ)
    manifest = prepare(recipe, tmp_path / "out", workers=1)
    assert manifest.tokenizer.engine == "tokenizers" and "different ids" in manifest.tokenizer.engine_reason
    assert load_manifest(dataset).tokenizer.engine == "gigatoken"
    assert data_bytes(tmp_path / "out") == data_bytes(dataset)


def test_a_dataset_is_made_once_and_replaced_only_on_request(recipe: Recipe, tmp_path: Path, capsys):
    out = tmp_path / "out"
    first = prepare(recipe, out, workers=1)
    stamp = (out / "train.bin").stat().st_mtime_ns
    assert prepare(recipe, out, workers=1) == first
    assert "already holds this dataset" in " ".join(capsys.readouterr().err.split())
    assert (out / "train.bin").stat().st_mtime_ns == stamp

    other = changed(recipe, split={"validation": 0.4})
    with pytest.raises(ValueError, match=r"another dataset \(recipe.split.validation\).*--overwrite"):
        prepare(other, out, workers=1)
    assert prepare(other, out, workers=1, overwrite=True).splits["validation"].documents > 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("do not touch")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is not a prepared dataset"):
            prepare(recipe, mine, workers=1, overwrite=overwrite)


def test_another_tokenizer_at_the_same_path_is_the_one_that_encodes(recipe: Recipe, texts: list[str], tmp_path: Path):
    prepare(recipe, tmp_path / "out", workers=1)
    other = train_bpe(texts, 300, tmp_path / "other")
    spec = {"kind": "pretrained", "path": str(other.folder)}
    prepare(changed(recipe, tokenizer=spec), tmp_path / "out", workers=1, overwrite=True)
    indexed = IndexedDataset(str(tmp_path / "out" / "train"))
    assert other.decode(np.array(indexed[0])[:-1]) == documents_of(recipe, "train")[0]


def test_a_recipe_may_name_the_end_of_documents_for_a_tokenizer_that_does_not(recipe: Recipe, tmp_path: Path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"other": 0, "END": 1}, unk_token="other"))
    words.add_special_tokens(["END"])
    words.save(str(tmp_path / "tokenizer.json"))
    for token, message in ((None, r"names no eos_token: .*tokenizer.end_of_document"), ("STOP", "'STOP' is not in")):
        spec = {"kind": "pretrained", "path": str(tmp_path), "end_of_document": token}
        with pytest.raises(ValueError, match=message):
            prepare(changed(recipe, tokenizer=spec), tmp_path / "out", workers=1)
    manifest = prepare(changed(recipe, tokenizer=spec | {"end_of_document": "END"}), tmp_path / "out", workers=1)
    assert (manifest.tokenizer.eod_token, manifest.tokenizer.eod_id) == ("END", 1)


def test_changed_files_and_unfinished_work_of_others_are_noticed(text_folder: Path, recipe: Recipe, tmp_path: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"some text {number}" * 9)
    own = changed(recipe, sources=[{"kind": "files", "path": str(folder)}], split={"validation": 0.5})
    prepare(own, tmp_path / "out", workers=1)
    (folder / "3.txt").write_text("other text")
    with pytest.raises(ValueError, match=r"another dataset \(inputs\)"):
        prepare(own, tmp_path / "out", workers=1)

    work = tmp_path / "new.partial"
    work.mkdir()
    (work / "plan.json").write_text('{"identity": {"format": 0}, "engine": null}')
    with pytest.raises(ValueError, match="unfinished work on another dataset"):
        prepare(own, tmp_path / "new", workers=1)
    prepare(own, tmp_path / "new", workers=1, overwrite=True)
    assert not work.exists()


def test_unreadable_files_are_listed_and_empty_results_are_errors(recipe: Recipe, tmp_path: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "empty.txt").write_text("")
    own = changed(recipe, sources=[{"kind": "files", "path": str(folder)}])
    with pytest.raises(
        ValueError, match=r"no documents: 2 could not be read \(first bad.txt: not UTF-8.*\), 0 left out by filters"
    ):
        prepare(own, tmp_path / "out", workers=1)
    (folder / "good.txt").write_text("the only document")
    with pytest.raises(ValueError, match=r"no document of 1 falls into (train|validation) .*set it to 0"):
        prepare(own, tmp_path / "out", workers=1)
    manifest = prepare(changed(own, split={"validation": 0.0}), tmp_path / "out", workers=1)
    assert [(entry.name, entry.reason[:9]) for entry in manifest.skipped] == [
        ("bad.txt", "not UTF-8"),
        ("empty.txt", "empty"),
    ]
    assert (manifest.skipped_total, manifest.filtered, list(manifest.splits)) == (2, 0, ["train"])
    assert not (tmp_path / "out" / "validation.bin").exists() and not (tmp_path / "out.partial").exists()


def test_a_tokenizer_is_trained_on_the_training_documents_alone(recipe: Recipe, tmp_path: Path):
    documents = documents_of(recipe, "train")
    sizes = np.cumsum([len(text.encode()) for text in documents])
    for limit, used in ((None, documents), (10_000, documents[: int(np.searchsorted(sizes, 10_000)) + 1])):
        own = changed(recipe, tokenizer={"kind": "bpe", "vocab_size": 300, "max_training_bytes": limit})
        manifest = prepare(own, tmp_path / f"out{limit}", workers=1)
        expected = train_bpe(used, 300, tmp_path / f"expected{limit}")
        assert manifest.tokenizer.fingerprint == expected.fingerprint
        assert (manifest.tokenizer.vocab_size, manifest.tokenizer.eod_id) == (300, 0)


def test_filters_leave_out_by_length(recipe: Recipe, tmp_path: Path, texts: list[str]):
    own = changed(recipe, filters={"min_characters": 500, "max_characters": 1500})
    manifest = prepare(own, tmp_path / "out", workers=1)
    kept = [text for text in texts if 500 <= len(text) <= 1500]
    assert 0 < len(kept) == sum(split.documents for split in manifest.splits.values())
    assert manifest.filtered == len(texts) - len(kept)


def test_whole_sources_can_be_one_split(recipe: Recipe, tmp_path: Path, text_folder: Path):
    sources = [
        {"kind": "files", "path": str(text_folder / "part0"), "split": "train"},
        {"kind": "files", "path": str(text_folder / "part1"), "split": "validation"},
    ]
    manifest = prepare(changed(recipe, sources=sources), tmp_path / "out", workers=1)
    assert {name: split.documents for name, split in manifest.splits.items()} == {"train": 21, "validation": 21}
    assert [source.documents for source in manifest.sources] == [21, 21]


def test_the_split_of_a_file_never_changes():
    recipe = recipe_from_dict(
        {
            "sources": [{"kind": "python_stdlib"}],
            "tokenizer": {"kind": "bpe", "vocab_size": 300},
            "split": {"validation": 0.5},
        }
    )
    names = [
        "argparse.py",
        "ast.py",
        "asyncio/base_events.py",
        "json/decoder.py",
        "os.py",
        "re/_parser.py",
        "typing.py",
    ]
    chosen = [choose_split(recipe, recipe.sources[0], Document(0, (("x", True),), 1, name, b"")) for name in names]
    # As they fell when the split was first made: data prepared anywhere, at any time, keeps the same files apart.
    assert [name for name, split in zip(names, chosen, strict=True) if split == "validation"] == [
        "asyncio/base_events.py",
        "os.py",
        "re/_parser.py",
        "typing.py",
    ]
    # Of all files about as many as asked for: within five standard deviations.
    files = [path.name for path in Path(sysconfig.get_path("stdlib")).glob("*.py")]
    chosen = [choose_split(recipe, recipe.sources[0], Document(0, (("x", True),), 1, name, b"")) for name in files]
    assert abs(chosen.count("validation") / len(files) - 0.5) < 5 * 0.5 / len(files) ** 0.5


def test_bad_lines_are_named_by_their_line_in_the_whole_file(recipe: Recipe, tmp_path: Path):
    lines = [json.dumps({"text": "x" * 2000 + str(number)}) for number in range(1500)]
    bad = {1: "{", 700: '{"text": ""}', 701: '{"text": 5}', 1400: '{"body": "x"}', 1500: "nonsense"}
    for number, line in bad.items():
        lines[number - 1] = line
    lines[10:10] = ["", "  "]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    own = changed(recipe, sources=[{"kind": "jsonl", "path": str(path)}])
    assert len(plan_preparation(own).parts) >= 3
    manifest = prepare(own, tmp_path / "out", workers=1)
    expected = [f"{path}:line {number + 2 * (number > 10)}" for number in bad]
    assert [entry.name for entry in manifest.skipped] == expected
    assert manifest.skipped_total == len(bad)
    assert sum(split.documents for split in manifest.splits.values()) == 1500 - len(bad)
    assert f"{path}:line 702: empty" in manifest.summary()


def test_a_manifest_of_an_older_version_still_belongs_to_its_recipe(recipe: Recipe, tmp_path: Path):
    out = tmp_path / "out"
    prepare(recipe, out, workers=1)
    tree = json.loads((out / "manifest.json").read_text())
    for key in ("duplicates", "duplicates_total", "files", "command", "digest"):
        del tree[key]
    tree["identity"]["recipe"]["filters"] = {"min_characters": 1, "max_characters": None}
    (out / "manifest.json").write_text(json.dumps(tree))
    assert prepare(recipe, out, workers=1).command == ""
