"""Files as they lie about: paths, patterns, links, hidden files, marks of order, long rows, kinds of columns."""

from __future__ import annotations

import bz2
import glob
import io
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from prepare_examples import changed
from pydantic import TypeAdapter
from test_sources import jsonl, read_all, texts_of

from moba_megatron.corpus.documents import CorpusError, Skipped
from moba_megatron.corpus.files import find_files, match_files
from moba_megatron.corpus.inspect import dataset_manifest
from moba_megatron.corpus.prepare import prepare
from moba_megatron.corpus.recipe import Filters, Recipe, Source, recipe_from_dict
from moba_megatron.corpus.sources import list_inputs, list_parts, read_part
from moba_megatron.corpus.tokenizer import Tokenizer


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}")


def limited(limit: int, **source: Any) -> list:
    checked = TypeAdapter(Source).validate_python(source)
    parts = list_parts(0, checked, list_inputs(checked), 2**40)
    return [item for part in parts for item in read_part(checked, part, Filters(max_row_bytes=limit))]


def test_patterns_mean_what_they_mean_in_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ["a.txt", "b.md", "x/a.txt", "x/y/a.txt", "x/y/z/b1.txt", "q/[r] s.txt", "w #1/é~.txt", "v*/a.txt"]
    make(tmp_path, *names)
    monkeypatch.chdir(tmp_path)
    for pattern in ("*.txt", "**/*.txt", "x/**/*.txt", "*/a.txt", "x/*/*", "**/b?.txt", "[ab].*", "none/*", "*/*/*/*"):
        expected = sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
        assert find_files(pattern).names == expected == match_files(Path("."), pattern).names, pattern
    # What exists is meant literally, all of it or its folders.
    assert find_files("q/[r] s.txt").names == ["q/[r] s.txt"]
    assert find_files("v*/*.txt").names == ["v*/a.txt"]
    assert find_files(str(tmp_path / "w #1/*")).names == [str(tmp_path / "w #1/é~.txt")]
    assert [item.path for item in read_all(kind="files", path="q", pattern="[r] s.txt")] == ["[r] s.txt"]
    monkeypatch.setenv("HOME", str(tmp_path / "x"))
    assert [item.path for item in read_all(kind="files", path="~/y")] == ["a.txt", "z/b1.txt"]


def test_links_are_followed_once_and_circles_end(tmp_path: Path):
    make(tmp_path, "own/1.txt", "own/deep/2.txt", "else/wiki/3.txt", "else/4.txt")
    root = tmp_path / "own"
    (root / "a_link").symlink_to("../else")
    (root / "another").symlink_to("../else/wiki")
    (root / "deep/up").symlink_to("..")
    (root / "deep_again").symlink_to("deep")
    (root / "broken").symlink_to("nowhere")
    (root / "5.txt").symlink_to("../else/4.txt")
    (root / "loop").symlink_to("loop")
    expected = ["1.txt", "5.txt", "a_link/wiki/3.txt", "deep/2.txt"]
    found = match_files(root, "**/*.txt")
    assert found.names == expected
    told = dict(found.left_out)
    assert (
        told["a_link/4.txt"] == "the same file as 5.txt"
        and told["another/3.txt"] == "the same file as a_link/wiki/3.txt"
    )
    assert told["deep/up"] == told["deep_again/up"] == "a link to a folder above it"
    assert "deep_again/2.txt" in told and "Too many levels" in match_files(root, "**/*").left_out[-1][1]
    (root / "dangling.txt").symlink_to("nowhere.txt")
    assert ("dangling.txt", "a link that leads nowhere") in match_files(root, "**/*.txt").left_out
    # A link that the pattern names leads there, whatever else does.
    (root / "latest").symlink_to("deep")
    assert match_files(root, "**/latest/*.txt").names == ["latest/2.txt"]
    assert [item.path for item in read_all(kind="files", path=str(root))] == expected
    for name in expected:
        (root / name).write_text('{"text": "row"}\n')
    assert len(read_all(kind="jsonl", path=str(root / "**/*.txt"))) == 4


def test_hidden_files_are_left_out_and_listed(tmp_path: Path, recipe: Recipe):
    root = tmp_path / "corpus"
    make(root, "a.txt", "._a.txt", ".ipynb_checkpoints/b.txt", "deep/.git/c.txt", "deep/d.txt", ".hidden.md")
    found = match_files(root, "**/*.txt")
    assert found.names == ["a.txt", "deep/d.txt"]
    assert [name for name, _ in found.left_out] == ["._a.txt", ".ipynb_checkpoints", "deep/.git"]
    assert match_files(root, "**/.*.txt").names == ["._a.txt"]
    assert match_files(root, "deep/.git/*").names == ["deep/.git/c.txt"]
    sources = [{"kind": "files", "path": str(root)}]
    manifest = prepare(changed(recipe, sources=sources, split={"validation": 0}), tmp_path / "out", workers=1)
    assert manifest.splits["train"].documents == 2 and manifest.skipped_total == 3
    assert [(entry.name, entry.reason) for entry in manifest.skipped] == found.left_out
    assert all(entry.reason.startswith("hidden") for entry in manifest.skipped)


def test_marks_of_order_are_no_text(tmp_path: Path):
    text = "naïve 東京"
    for number, encoding in enumerate(("utf-8", "utf-8-sig", "utf-16", "utf-32")):
        (tmp_path / f"{number}.txt").write_bytes(text.encode(encoding))
    (tmp_path / "4.txt").write_bytes(b"\xff\xfea")
    *same, broken = read_all(kind="files", path=str(tmp_path))
    assert texts_of(same) == [text] * 4 and len({item.digest for item in same}) == 1
    assert isinstance(broken, Skipped) and "not UTF-8" in broken.reason
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(jsonl([text, text])))
    assert texts_of(read_all(kind="jsonl", path=str(tmp_path / "rows.jsonl"))) == [text, text]


@pytest.mark.parametrize("ending", [".jsonl.bz2", ".NDJSON.XZ", ".jsonl.ZST", ".json.Gz"])
def test_compressed_rows_by_any_ending_are_read_to_their_end(tmp_path: Path, texts: list[str], ending: str):
    import gzip

    compress = {
        ".bz2": bz2.compress, ".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress
    }[Path(ending).suffix.lower()]  # fmt: skip
    lines = jsonl(texts)
    path = tmp_path / f"a{ending}"
    whole = compress(b"".join(lines[:20])) + compress(b"".join(lines[20:]))
    path.write_bytes(whole)
    assert texts_of(read_all(kind="jsonl", path=str(tmp_path))) == texts
    second = len(compress(b"".join(lines[:20])))
    damaged = whole[:second] + b"\0\1" + whole[second + 2 :]
    for data in (whole[:-1], whole[: len(whole) // 2], damaged):
        path.write_bytes(data)
        with pytest.raises(CorpusError, match="cannot be read to its end"):
            read_all(kind="jsonl", path=str(path))
    path.write_bytes(b"")
    assert read_all(kind="jsonl", path=str(path)) == []


def test_zstd_with_a_long_window(tmp_path: Path, texts: list[str]):
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    with open(tmp_path / "a.jsonl.zst", "wb") as file:
        with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(file) as stream:
            stream.write(b"".join(jsonl(texts)))
    head = (tmp_path / "a.jsonl.zst").read_bytes()[:64]
    assert zstandard.get_frame_parameters(head).window_size == 2**30
    assert texts_of(read_all(kind="jsonl", path=str(tmp_path / "a.jsonl.zst"))) == texts


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_row_over_the_limit_is_never_whole_in_memory(tmp_path: Path, ending: str):
    """Two megabytes of zeros and more on one line; the limit is 1,000 bytes."""
    import gzip

    long = b'{"text": "' + b"0" * 2_500_000 + b'"}\n'
    lines = [*jsonl(["before"]), long, *jsonl(["after", "x" * 970, "x" * 1000])]
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[ending]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compress(b"".join(lines)))
    items = limited(1000, kind="jsonl", path=str(path))
    assert [isinstance(item, Skipped) for item in items] == [False, True, False, False, True]
    assert [item.number for item in items] == [1, 2, 3, 4, 5]
    assert items[1].reason == "a row of more than filters.max_row_bytes = 1,000 bytes"
    for part_bytes in (30_000, 700_000):
        # Byte ranges that begin within the long line as well.
        checked = TypeAdapter(Source).validate_python({"kind": "jsonl", "path": str(path)})
        parts = list_parts(0, checked, list_inputs(checked), part_bytes)
        found = [item for part in parts for item in read_part(checked, part, Filters(max_row_bytes=1000))]
        assert [isinstance(item, Skipped) for item in found] == [isinstance(item, Skipped) for item in items]


def test_long_texts_in_tables_and_long_files_are_skipped(tmp_path: Path):
    texts = ["short", "0" * 5000, "end"]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.feather.write_feather(
        pyarrow.table({"text": pyarrow.array(texts).dictionary_encode()}), str(tmp_path / "a.arrow")
    )
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    for source in (
        {"kind": "parquet", "path": str(tmp_path / "a.parquet")},
        {"kind": "arrow", "path": str(tmp_path / "a.arrow")},
        {"kind": "files", "path": str(tmp_path)},
    ):
        first, second, third = limited(4000, **source)
        assert (first.text, third.text) == ("short", "end")
        assert isinstance(second, Skipped) and "filters.max_row_bytes = 4,000 bytes" in second.reason


def test_a_row_of_exactly_the_limit_is_kept_however_it_ends(tmp_path: Path):
    row = b'{"text": "abc"}'
    for ending in (b"", b"\n", b"\r\n"):
        (tmp_path / "a.jsonl").write_bytes(row + ending)
        assert len(texts_of(limited(len(row), kind="jsonl", path=str(tmp_path / "a.jsonl")))) == 1
        (skipped,) = limited(len(row) - 1, kind="jsonl", path=str(tmp_path / "a.jsonl"))
        assert isinstance(skipped, Skipped)


def test_the_output_is_no_part_of_its_input(tmp_path: Path, tokenizer: Tokenizer):
    """Made within the folder that is read, twice."""
    (tmp_path / "rows.jsonl").write_bytes(b"".join(jsonl(["a text", "another"])))
    source = {"kind": "jsonl", "path": str(tmp_path)}
    spec = {"kind": "pretrained", "path": str(tokenizer.folder)}
    recipe = recipe_from_dict({"sources": [source], "tokenizer": spec, "split": {"validation": 0}})
    made = prepare(recipe, tmp_path / "out", workers=1)
    assert made.splits["train"].documents == 2 and made.sources[0].inputs == 1
    assert prepare(recipe, tmp_path / "out", workers=1) == made


def test_every_type_of_a_text_column(tmp_path: Path):
    texts = ["naïve", "東京" * 30, None, "b", "naïve"]
    types = [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(), pyarrow.large_binary()]
    types += [pyarrow.binary_view(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]
    for number, kind in enumerate(types):
        values = [text.encode() if text and "binary" in str(kind) else text for text in texts]
        array = pyarrow.array(values, pyarrow.string()).dictionary_encode() if "dict" in str(kind) else None
        table = pyarrow.table({"text": array if array is not None else pyarrow.array(values, kind)})
        path = tmp_path / f"{number}.arrow"
        pyarrow.feather.write_feather(table, str(path), compression="uncompressed")
        items = read_all(kind="arrow", path=str(path))
        assert [getattr(item, "text", None) for item in items] == texts, kind
        if "view" not in str(kind):
            pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet")
            items = read_all(kind="parquet", path=str(tmp_path / f"{number}.parquet"))
            assert [getattr(item, "text", None) for item in items] == texts, kind


def test_one_json_list_is_refused_with_what_reads_it(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    with pytest.raises(CorpusError, match="a.json is one JSON list, .* kind: datasets, path: json"):
        read_all(kind="jsonl", path=str(tmp_path / "a.json"))
    assert texts_of(read_all(kind="datasets", path="json", data_files=str(tmp_path / "a.json"))) == ["a", "b"]


def test_work_and_result_are_where_a_link_leads(tmp_path: Path, recipe: Recipe):
    (tmp_path / "disk").mkdir()
    for target in ("disk", "disk/new"):
        (tmp_path / "out").unlink(missing_ok=True)
        (tmp_path / "out").symlink_to(target)
        prepare(recipe, tmp_path / "out", workers=1, overwrite=True)
        assert (tmp_path / "out").is_symlink() and (tmp_path / target / "train.bin").is_file()
        assert dataset_manifest(tmp_path / "out") == dataset_manifest(tmp_path / target)
        if target == "disk":
            for path in (tmp_path / "disk").iterdir():
                path.rename(tmp_path / path.name)
    with pytest.raises(ValueError, match=r"/proc is a mount point, .*: name a folder in it, such as /proc/data"):
        prepare(recipe, Path("/proc"), workers=1)


def test_the_bar_moves_inside_a_part(tmp_path: Path, texts: list[str]):
    """What is told of while a part is read adds up to its size, and not at its end alone."""
    lines = b"".join(jsonl(texts * 40))
    table = pyarrow.table({"text": texts * 40})
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor(level=1).compress(lines))
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "d.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    for name in ("a.jsonl", "b.jsonl.zst", "c.parquet", "d.arrow"):
        kind = {"jsonl": "jsonl", "parquet": "parquet", "arrow": "arrow"}[name.split(".")[1]]
        source = TypeAdapter(Source).validate_python({"kind": kind, "path": str(tmp_path / name)})
        (part,) = list_parts(0, source, list_inputs(source), 2**40)
        told: list[int] = []
        halfway = 0
        for number, _ in enumerate(read_part(source, part, advance=told.append)):
            if number == len(texts) * 30:
                halfway = sum(told)
        # A buffer of a megabyte is read ahead of a compressed file.
        assert 0.5 * part.size <= halfway <= part.size, (name, halfway, part.size)
        assert 0.9 * part.size <= sum(told) <= part.size, (name, sum(told), part.size)


def test_endings_that_a_folder_of_rows_has(tmp_path: Path):
    for name in ("a.jsonl", "b.NDJSON", "c.jsonlines", "deep/d.json", "left.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"".join(jsonl([name])))
    assert texts_of(read_all(kind="jsonl", path=str(tmp_path))) == ["a.jsonl", "b.NDJSON", "c.jsonlines", "deep/d.json"]


def test_a_decompressor_is_not_fed_faster_than_its_output_is_taken(tmp_path: Path):
    """600 MB in 18 KB: at most some megabytes are unpacked at a time."""
    from moba_megatron.corpus.jsonl import _Unpacked

    bomb = zstandard.ZstdCompressor(level=3).compress(b"0" * 100_000_000)
    stream, buffer, largest, total = _Unpacked(io.BytesIO(bomb), ".zst"), bytearray(2**16), 0, 0
    while size := stream.readinto(memoryview(buffer)):
        total += size
        largest = max(largest, len(stream._output))
    assert total == 100_000_000 and largest < 2**26
