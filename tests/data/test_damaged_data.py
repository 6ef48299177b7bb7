"""Every data file that we write, flipped and cut at its start, middle and end: what finds it at a start, what finds it
when all is read, and where it does not matter."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moba_megatron.cli import app
from moba_megatron.config import Config, ConfigError, config_from_dict
from moba_megatron.corpus.indexed import check_index, load_index, read_index
from moba_megatron.corpus.inspect import check_dataset
from moba_megatron.corpus.manifest import load_manifest
from moba_megatron.corpus.prepare import prepare
from moba_megatron.corpus.recipe import recipe_from_dict
from moba_megatron.data import trusted
from moba_megatron.data.datasets import INDEX_CACHE, build_datasets, check_data
from moba_megatron.data.packing_datasets import KnownTokens

PLACES = {"start": 0.0, "middle": 0.5, "end": 1.0}


def config_of(folder: Path, **data: Any) -> Config:
    return config_from_dict({
        "run": {"dir": "unused"},
        "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
        "attention": {"block_size": 16},
        "data": {
            "train": str(folder / "train"),
            "tokenizer": str(folder / "tokenizer"),
            "sequence_length": 64,
            **data,
        },
        "training": {"steps": 5, "global_batch_size": 8},
        "optimizer": {"lr": 1e-3},
    })  # fmt: skip


@pytest.fixture(scope="module")
def masked(tokenizer, tmp_path_factory) -> Path:
    """Prepared prompts and answers, which have a loss mask."""
    folder = tmp_path_factory.mktemp("masked")
    rows = [{"prompt": f"what is {n} and {n}? " * 4, "answer": f"it is {2 * n}. " * 4} for n in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "jsonl", "path": str(folder / "rows.jsonl"), "prompt_column": "prompt", "answer_column": "answer"}
    recipe = recipe_from_dict({
        "sources": [source],
        "tokenizer": {"kind": "pretrained", "path": str(tokenizer.folder)},
        "split": {"validation": 0.2},
    })  # fmt: skip
    prepare(recipe, folder / "set", workers=1)
    return folder / "set"


@pytest.fixture
def own(masked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(masked, tmp_path / "own", ignore=shutil.ignore_patterns(INDEX_CACHE)))


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= 0x55
    path.write_bytes(data)


def cut(path: Path, place: float) -> None:
    """Take the first bytes away, the second half, or the last bytes."""
    data = path.read_bytes()
    path.write_bytes({0.0: data[8:], 0.5: data[: len(data) // 2], 1.0: data[:-8]}[place])


def found_by_start(folder: Path) -> bool:
    try:
        check_data(config_of(folder))
    except ConfigError:
        return True
    return False


# What a start finds; `prepare inspect --check` and `doctor --data` find all of it. Token ids and marks of the mask that
# became others of their kind are found by reading all alone: that takes as long as the data are large.
FOUND_AT_START = {
    ("manifest.json", "flip"): ("start", "middle", "end"),
    ("manifest.json", "cut"): ("start", "middle", "end"),
    ("train.idx", "flip"): ("start", "middle", "end"),
    ("train.idx", "cut"): ("start", "middle", "end"),
    ("train.bin", "cut"): ("start", "middle", "end"),
    ("train.bin", "flip"): (),
    ("train.loss_mask.bin", "cut"): ("start", "middle", "end"),
    ("train.loss_mask.bin", "flip"): ("start", "middle", "end"),
    ("tokenizer/tokenizer.json", "flip"): ("start", "middle"),
    ("tokenizer/tokenizer.json", "cut"): ("start", "middle", "end"),
}
# The last byte of a JSON file is a line end, which says nothing.
SAYS_NOTHING = {("tokenizer/tokenizer.json", "flip", "end")}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("file", "how"), FOUND_AT_START, ids=lambda value: value.replace("/", "-"))
def test_damage_is_found(own: Path, file: str, how: str, place: str):
    {"flip": flip, "cut": cut}[how](own / file, PLACES[place])
    at_start = found_by_start(own)
    assert at_start or place not in FOUND_AT_START[file, how]
    if (file, how, place) in SAYS_NOTHING:
        return
    result = CliRunner().invoke(app, ["doctor", "--data", str(own)])
    assert result.exit_code == 2 and "damaged" in result.output or file in result.output, result.output


def test_doctor_finds_whole_data_in_order(own: Path):
    result = CliRunner().invoke(app, ["doctor", "--data", str(own)])
    assert result.exit_code == 0 and "documents of train: ok" in result.output, result.output
    assert all(problem is None for _, problem in check_dataset(own))
    result = CliRunner().invoke(app, ["doctor", "--data", str(own.parent)])
    assert (result.exit_code, "is not a prepared dataset" in result.output) == (2, True)


def test_a_lost_loss_mask_is_not_training_on_prompts(own: Path):
    (own / "train.loss_mask.bin").unlink()
    with pytest.raises(ConfigError, match="train.loss_mask.bin is missing, but the manifest says that not every token"):
        check_data(config_of(own))


@pytest.mark.parametrize("name", ["../other.bin", "/etc/passwd", "a/b.bin", "..", "a\0b", ""])
def test_a_manifest_names_no_file_outside_of_its_folder(own: Path, name: str):
    values = json.loads((own / "manifest.json").read_text())
    values.pop("digest")
    values["files"][name] = {"bytes": 1, "hash": "x"}
    (own / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"manifest.json is not a manifest .* which is not a file of its own folder"):
        load_manifest(own)


def test_a_manifest_of_other_numbers_is_refused(own: Path):
    text = (own / "manifest.json").read_text()
    assert load_manifest(own) is not None
    (own / "manifest.json").write_text(text.replace('"filtered": 0', '"filtered": 1'))
    with pytest.raises(ValueError, match="manifest.json was changed after it was written"):
        load_manifest(own)


# Header of an index: magic (9 bytes), version (8), code (1), sequences (8), documents (8).
def with_header(path: Path, sequences: int, documents: int) -> None:
    data = bytearray(path.read_bytes())
    data[18:34] = struct.pack("<QQ", sequences, documents)
    path.write_bytes(data)


def changed(path: Path, entry: Callable[[int], int], kind: str, value: int) -> None:
    """Write a number into the table of an index."""
    data = bytearray(path.read_bytes())
    (sequences,) = struct.unpack_from("<Q", data, 18)
    struct.pack_into(kind, data, entry(sequences), value)
    path.write_bytes(data)


INDEX_DAMAGE = {
    "sequences 2^60": lambda path: with_header(path, 2**60, 2**60 + 1),
    "sequences 2^64 - 1": lambda path: with_header(path, 2**64 - 1, 1),
    "documents 2^60": lambda path: with_header(path, 3, 2**60),
    "documents 0": lambda path: with_header(path, 3, 0),
    "negative length": lambda path: changed(path, lambda n: 34, "<i", -5),
    "longer": lambda path: changed(path, lambda n: 34, "<i", 2**31 - 1),
    "negative offset": lambda path: changed(path, lambda n: 34 + 4 * n, "<q", -2),
    "offset 2^62": lambda path: changed(path, lambda n: 34 + 4 * n + 8, "<q", 2**62),
    "offset within a token": lambda path: changed(path, lambda n: 34 + 4 * n + 8, "<q", 3),
    "documents fall": lambda path: changed(path, lambda n: 34 + 12 * n + 8, "<q", 2**40),
    "first document": lambda path: changed(path, lambda n: 34 + 12 * n, "<q", 1),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE.values(), ids=INDEX_DAMAGE)
@pytest.mark.parametrize("known", [True, False], ids=["manifest", "no manifest"])
def test_the_contents_of_an_index_are_not_trusted(own: Path, damage: Callable[[Path], None], known: bool):
    damage(own / "train.idx")
    if not known:
        (own / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"data.train = .*train"):
        check_data(config_of(own))
    with pytest.raises(ValueError, match=r"train.idx|train.bin"):
        load_index(own / "train")


def test_two_lengths_that_add_up_are_found(own: Path):
    lengths = read_lengths(own / "train.idx")
    changed(own / "train.idx", lambda n: 34, "<i", int(lengths[0]) + 1)
    changed(own / "train.idx", lambda n: 38, "<i", int(lengths[1]) - 1)
    read_index(own / "train")  # the sum is right
    with pytest.raises(ValueError, match="train.idx is damaged: document 1 would have"):
        check_index(own / "train")


def read_lengths(path: Path) -> np.ndarray:
    (count,) = struct.unpack_from("<Q", path.read_bytes(), 18)
    return np.fromfile(path, "<i4", count, offset=34)


def test_an_index_is_looked_through_once_and_by_rank_0_alone(own: Path, monkeypatch: pytest.MonkeyPatch):
    looked = []
    monkeypatch.setattr(trusted, "check_index", looked.append)
    trusted._look_through.cache_clear()
    config = config_of(own)
    monkeypatch.setenv("RANK", "1")
    check_data(config)
    assert looked == []
    monkeypatch.setenv("RANK", "0")
    check_data(config)
    assert len(looked) == 1
    build_datasets(config)
    trusted._look_through.cache_clear()  # as a new process has it
    check_data(config)
    assert len(looked) == 1, "checked.json remembers"
    (own / "train.idx").touch()
    check_data(config)
    assert len(looked) == 2


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("part", ["document_index", "sample_index", "shuffle_index"])
def test_a_sample_index_that_was_changed_is_made_anew(own: Path, packing: str, part: str):
    config = config_of(own, packing=packing)

    def rows() -> list[list[int]]:
        dataset = build_datasets(config)[0]
        return [dataset[number]["tokens"].tolist() for number in range(40)]

    expected = rows()
    (path,) = (own / INDEX_CACHE).glob(f"*train-{part}.npy")
    whole = path.read_bytes()
    values = np.load(path)
    np.save(path, np.roll(values, 1, axis=0))
    assert path.read_bytes() != whole and path.stat().st_size == len(whole)
    assert rows() == expected and path.read_bytes() == whole
    for place in PLACES.values():
        flip(path, place)
        assert rows() == expected and path.read_bytes() == whole
    stamp = path.stat().st_mtime_ns
    (own / INDEX_CACHE / "digests.json").write_text("{")
    assert rows() == expected and path.stat().st_mtime_ns > stamp, "nothing is known of it"
    stamp = path.stat().st_mtime_ns
    assert rows() == expected and path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_foreign_id_names_the_file_and_the_document(own: Path, packing: str):
    config = config_of(own, packing=packing)
    document, start, _ = build_datasets(config)[0]._pieces(11)[0].tolist()
    ids = np.fromfile(own / "train.bin", np.uint16)
    ids[int(load_index(own / "train").offsets[document]) // 2 + start] = 60000
    ids.tofile(own / "train.bin")
    dataset = KnownTokens(build_datasets(config)[0])
    said = rf"own/train.bin: token {start} of document {document} is id 60000, but data.tokenizer has 400 entries"
    with pytest.raises(ConfigError, match=said):
        dataset[11]
    (own / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=rf"train.bin, document {document}, token \d+, holds id 60000, over the"):
        check_data(config)


def test_an_order_of_samples_that_no_memory_holds_is_refused(own: Path):
    values = config_of(own).model_dump(mode="json")
    values["training"]["steps"], values["training"]["global_batch_size"] = 10**9, 2**20
    with pytest.raises(ConfigError, match=r"training.steps = 1000000000 x .* epochs of \d+ documents, takes .* GiB"):
        check_data(config_from_dict(values))
