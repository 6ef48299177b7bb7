from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from pydantic import TypeAdapter

from moba_megatron.corpus.documents import CorpusError, Document, Incomplete, Skipped
from moba_megatron.corpus.recipe import Source
from moba_megatron.corpus.sources import list_inputs, list_parts, read_part

LARGE = 2**40


def read_all(part_bytes: int = LARGE, **source: Any) -> list[Document | Skipped]:
    checked = TypeAdapter(Source).validate_python(source)
    parts = list_parts(0, checked, list_inputs(checked), part_bytes)
    return [item for part in parts for item in read_part(checked, part)]


def texts_of(items: list[Document | Skipped]) -> list[str]:
    assert all(isinstance(item, Document) for item in items), [i for i in items if isinstance(i, Skipped)]
    return [item.text for item in items]


def jsonl(texts: list[str]) -> list[bytes]:
    return [json.dumps({"text": text, "n": n}).encode() + b"\n" for n, text in enumerate(texts)]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def test_folders_of_files(text_folder: Path, texts: list[str]):
    items = read_all(kind="files", path=str(text_folder))
    names = [item.path for item in items]
    assert names == sorted(names) and len(names) == len(texts)
    assert {name: item.text for name, item in zip(names, items, strict=True)} == {
        f"part{n % 3}/{n:03d}.txt": text for n, text in enumerate(texts)
    }
    pieces = read_all(part_bytes=3000, kind="files", path=str(text_folder))
    assert [(item.path, item.text) for item in pieces] == [(item.path, item.text) for item in items]
    kept = read_all(kind="files", path=str(text_folder), exclude=["part1", "00*"])
    assert {item.path for item in kept} == {name for name in names if "part1/" not in name and "/00" not in name}


def test_the_standard_library_is_read_without_its_tests():
    source = TypeAdapter(Source).validate_python(
        {"kind": "python_stdlib", "exclude": ["test", "tests", "idle_test", "site-packages", "dist-packages"]}
    )
    names = [item.name for item in list_inputs(source)]
    assert {"argparse.py", "asyncio/base_events.py"} <= set(names)
    assert not [name for name in names if "test" in name.split("/") or "site-packages" in name]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_jsonl_in_every_compression_and_in_several_frames(tmp_path: Path, texts: list[str], ending: str):
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[ending]
    lines = jsonl(texts)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compress(b"".join(lines[:20])) + compress(b"".join([*lines[20:], b"\n"])))
    assert texts_of(read_all(kind="jsonl", path=str(tmp_path / "*.jsonl*"))) == texts


@pytest.mark.parametrize("part_bytes", [1, 7, 500, 40_000])
def test_byte_ranges_of_jsonl_lose_and_double_nothing(tmp_path: Path, part_bytes: int):
    texts = [f"document {n} " * (1 + n % 5) for n in range(50)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(jsonl(texts)).rstrip(b"\n"))
    assert texts_of(read_all(part_bytes=part_bytes, kind="jsonl", path=str(tmp_path / "a.jsonl"))) == texts


def test_parquet_by_row_groups(tmp_path: Path, texts: list[str]):
    table = pyarrow.table({"id": range(len(texts)), "content": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=9)
    for part_bytes in (1, 20_000, LARGE):
        items = read_all(part_bytes, kind="parquet", path=str(tmp_path / "a.parquet"), text_column="content")
        assert texts_of(items) == texts
    with pytest.raises(ValueError, match=r"no column 'text' \(columns: content, id\)"):
        read_all(kind="parquet", path=str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="holds int64, not text"):
        read_all(kind="parquet", path=str(tmp_path / "a.parquet"), text_column="id")


def test_datasets_saved_built_and_streamed(tmp_path: Path, texts: list[str]):
    saved = datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "dict")
    for name, rows in (("a", texts[:30]), ("b", texts[30:])):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(jsonl(rows)))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    for source in (
        {"path": str(tmp_path / "saved")},
        {"path": str(tmp_path / "dict")},
        {"path": "json", "data_files": files},
        {"path": "json", "data_files": files, "streaming": True},
    ):
        assert texts_of(read_all(part_bytes=5000, kind="datasets", **source)) == texts, source
    datasets.Dataset.from_dict({"text": ["other"]}).save_to_disk(tmp_path / "saved")
    assert texts_of(read_all(kind="datasets", path=str(tmp_path / "saved"))) == ["other"]
    with pytest.raises(ValueError, match="datasets cannot load json: .*none.jsonl"):
        read_all(kind="datasets", path="json", data_files=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="no split 'test', only train"):
        read_all(kind="datasets", path=str(tmp_path / "dict"), dataset_split="test")
    with pytest.raises(ValueError, match=r"no column 'body' \(columns: text\)"):
        read_all(kind="datasets", path=str(tmp_path / "saved"), text_column="body")


def test_what_is_no_text_is_skipped_with_place_and_reason(tmp_path: Path):
    lines = [
        b'{"text": "good"}',
        b"{broken",
        b'{"text": null}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": ""}',
        b'["text"]',
        b'{"body": "other"}',
        b'{"text": "end"}',
    ]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(lines)))
    items = read_all(kind="jsonl", path=str(path))
    assert [item.text for item in items if isinstance(item, Document)] == ["good", "end"]
    skipped = [item for item in items if isinstance(item, Skipped)]
    assert [item.number for item in skipped] == [2, 3, 4, 5, 6, 7, 8]
    reasons = (
        *("not JSON", "NoneType, not a string", "not UTF-8: surrogates", "not JSON: 'utf-8'"),
        *("empty", "a JSON list, not an object", "no column 'text'"),
    )
    assert all(reason in item.reason for item, reason in zip(skipped, reasons, strict=True))

    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (item,) = read_all(kind="files", path=str(tmp_path))
    assert item == Skipped(0, "not UTF-8: unexpected end of data at 3")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_truncated_files_are_errors(tmp_path: Path, texts: list[str], ending: str):
    compress = gzip.compress if ending == ".gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compress(b"".join(jsonl(texts)))[:-500])
    with pytest.raises(ValueError, match="cannot be read to its end"):
        read_all(kind="jsonl", path=str(path))


def test_missing_things_are_named(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 1000)
    with pytest.raises(ValueError, match=r"a.jsonl: the first 1000 rows .*: no column 'text' \(columns: body\)"):
        read_all(kind="jsonl", path=str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 999)
    assert set(map(type, read_all(kind="jsonl", path=str(tmp_path / "a.jsonl")))) == {Incomplete}
    with pytest.raises(ValueError, match="no documents: no file matches .*none.jsonl"):
        read_all(kind="jsonl", path=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="no documents: .*nowhere is not a folder"):
        read_all(kind="files", path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no documents: no file matches .* with pattern '\\*.md'"):
        read_all(kind="files", path=str(tmp_path), pattern="*.md")


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_that_cannot_be_read_are_named_and_one_bad_row_is_skipped(tmp_path: Path, streaming: bool):
    good = "".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(300))
    (tmp_path / "a.jsonl").write_text(good + "{broken\n")
    broken = {"kind": "datasets", "path": "json", "data_files": str(tmp_path / "a.jsonl"), "streaming": streaming}
    with pytest.raises(CorpusError, match="datasets cannot read json.*: JSON parse error: .* in row 300"):
        read_all(**broken)
    raw = pyarrow.array([*(b"good %d" % n for n in range(300)), b"\xff\xfe", b"end"], pyarrow.binary())
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    source = {"kind": "datasets", "path": "parquet", "data_files": str(tmp_path / "b.parquet")}
    items = read_all(part_bytes=1000, **source, streaming=streaming)
    assert items == read_all(kind="parquet", path=str(tmp_path / "b.parquet"))
    assert [item.number for item in items] == list(range(302))
    (bad,) = (item for item in items if isinstance(item, Skipped))
    assert bad.number == 300 and bad.reason.startswith("not UTF-8")


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_text_that_is_not_utf8_inside_messages_is_skipped(tmp_path: Path, kind: str):
    raw = pyarrow.array([b"user", b"\xff\xfe"], pyarrow.binary())
    role = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
    talks = pyarrow.ListArray.from_arrays([0, 1, 2], pyarrow.StructArray.from_arrays([role], ["role"]))
    pyarrow.parquet.write_table(pyarrow.table({"talk": talks}), tmp_path / "a.parquet")
    source = {"kind": "parquet", "path": str(tmp_path / "a.parquet")}
    if kind == "datasets":
        source = {"kind": kind, "path": "parquet", "data_files": str(tmp_path / "a.parquet")}
    checked = TypeAdapter(Source).validate_python(source | {"messages_column": "talk"})

    class Template:
        def documents(self, messages: Any, number: int, tools: Any, arguments: Any) -> list[tuple[int, Any]]:
            return [(number, messages)]

    (part,) = list_parts(0, checked, list_inputs(checked), LARGE)
    assert list(read_part(checked, part, None, Template())) == [(0, [{"role": "user"}]), (1, None)]


def test_an_error_of_the_system_is_no_truncated_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.jsonl.gz").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error") as caught:
        read_all(kind="jsonl", path=str(tmp_path / "a.jsonl.gz"))
    assert caught.value.errno == errno.EIO
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="Couldn't reach"):
        read_all(kind="datasets", path="no-one/nothing")
