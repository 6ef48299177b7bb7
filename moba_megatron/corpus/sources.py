"""Sources of text, divided into parts that can be read separately.

A source lists its inputs (files with sizes, or rows of a dataset) and is cut into *parts*: some small files, a byte
range of a JSONL file, row groups of a Parquet file, record batches of an Arrow file, a range of rows. Parts depend on
the inputs only, never on the number of workers; read one after the other they give all documents in one fixed order.
Compressed JSONL cannot be entered in the middle: one file is one part. A part is read as a stream, so memory holds one
record at a time.

If something cannot be a document (bytes that are not UTF-8, a line that is not JSON, a row without text), it becomes a
`Skipped` with its place and reason. If something would change the corpus (a column of another type, a truncated file),
it is an error. A column that no row of a source has is also an error. One part cannot know that, so the reader of all
parts finds it from the rows that are `Incomplete`. A part alone stops only if its first 1,000 rows are incomplete.
"""

from __future__ import annotations

import codecs
import fnmatch
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moba_megatron.corpus.chat import ChatTemplate
from moba_megatron.corpus.documents import Input, Item, Part, Skipped, make_document
from moba_megatron.corpus.files import Found, find_files, match_files, no_match, readable_size
from moba_megatron.corpus.hf_datasets import dataset_input, dataset_parts, read_dataset
from moba_megatron.corpus.jsonl import Advance, jsonl_parts, read_jsonl
from moba_megatron.corpus.recipe import (
    ArrowSource,
    DatasetsSource,
    FilesSource,
    Filters,
    JsonlSource,
    ParquetSource,
    RowsSource,
    SourceBase,
    StdlibSource,
)
from moba_megatron.corpus.rows import RowReader
from moba_megatron.corpus.tables import arrow_parts, parquet_parts, read_arrow, read_parquet

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def list_inputs(source: SourceBase) -> list[Input]:
    """The inputs of a source, in reading order.

    Raises:
        ValueError: nothing there.
    """
    return find_inputs(source)[0]


def find_inputs(source: SourceBase, without: tuple[Path, ...] = ()) -> tuple[list[Input], list[tuple[str, str]]]:
    """(inputs, what is left out and why) of a source, as `list_inputs`.

    Args:
        without: folders that are none of it, such as the one that is being made.
    """
    if isinstance(source, DatasetsSource):
        return [dataset_input(source)], []
    if isinstance(source, FilesSource | StdlibSource):
        found, where = _matching_files(source), f"{files_root(source)} with pattern {source.pattern!r}"
    else:
        assert isinstance(source, JsonlSource | ParquetSource | ArrowSource)
        found, where = find_files(source.path, source.kind), source.path
    folders = [str(folder.resolve()) + os.sep for folder in without]
    if folders:
        found.names = [
            name for name in found.names if not os.path.realpath(found.root / name).startswith(tuple(folders))
        ]
    if not found.names:
        passed = f" (except {len(found.left_out)} that are skipped: {found.left_out[0][1]})" if found.left_out else ""
        raise ValueError(no_match(f"{where}{passed}"))
    stats = [(name, (found.root / name).stat()) for name in found.names]
    return [Input(name, stat.st_size, str(stat.st_mtime_ns)) for name, stat in stats], found.left_out


def list_parts(number: int, source: SourceBase, inputs: list[Input], part_bytes: int) -> list[Part]:
    """Cut a source into parts of about `part_bytes`, in reading order. `number` is its place in the recipe."""
    if isinstance(source, DatasetsSource):
        return dataset_parts(number, source, part_bytes)
    if isinstance(source, FilesSource | StdlibSource):
        return _file_parts(number, inputs, part_bytes)
    parts: list[Part] = []
    for item in inputs:
        if isinstance(source, ParquetSource):
            parts += parquet_parts(number, item.name, part_bytes)
        elif isinstance(source, ArrowSource):
            parts += arrow_parts(number, item.name, item.size, part_bytes)
        else:
            parts += jsonl_parts(number, item.name, item.size, part_bytes)
    return parts


def read_part(
    source: SourceBase,
    part: Part,
    filters: Filters | None = None,
    template: ChatTemplate | None = None,
    advance: Advance = lambda size: None,
) -> Iterator[Item]:
    """The items of a part, in order.

    Args:
        filters: of the recipe; only its boolean columns and `max_row_bytes` are looked at here.
        template: of the tokenizer, for a source with `messages_column`.
        advance: told of the bytes of the part (as in its `size`) that were read since.

    Raises:
        CorpusError: a missing column, a column of another type, or a truncated file.
        OSError: the file system failed; reading again may succeed.
    """
    if isinstance(source, FilesSource | StdlibSource):
        return _read_files(files_root(source), part, (filters or Filters()).max_row_bytes, advance)
    assert isinstance(source, RowsSource)
    reader = RowReader(source, filters or Filters(), template)
    if isinstance(source, JsonlSource):
        return read_jsonl(reader, part, advance)
    if isinstance(source, ParquetSource):
        return read_parquet(reader, part, advance)
    if isinstance(source, ArrowSource):
        return read_arrow(reader, part, advance)
    assert isinstance(source, DatasetsSource)
    return read_dataset(source, reader, part, advance)


def place_name(source: SourceBase, part: Part, number: int, lines_before: int = 0) -> str:
    """Where item `number` of a part is, for people.

    Args:
        lines_before: lines of the file before this part, for JSONL, whose items are numbered within the part from 1.
    """
    if isinstance(source, FilesSource | StdlibSource):
        return part.names[number]
    if isinstance(source, JsonlSource):
        return f"{part.names[0]}:line {lines_before + number}"
    if isinstance(source, DatasetsSource):
        return (
            f"{source.path}: shard {part.start}, row {number}" if source.streaming else f"{source.path}: row {number}"
        )
    return f"{part.names[0]}: row {number}"


def files_root(source: FilesSource | StdlibSource) -> Path:
    """Folder that a source of files starts from."""
    return Path(sysconfig.get_path("stdlib") if isinstance(source, StdlibSource) else source.path)


def _matching_files(source: FilesSource | StdlibSource) -> Found:
    root = files_root(source)
    if not root.is_dir():
        raise ValueError(f"no documents: {root} is not a folder; relative paths count from {Path.cwd()}")
    if (root / source.pattern).is_file():
        return Found(root, [source.pattern])
    found = match_files(root, source.pattern)

    def kept(name: str) -> bool:
        return not any(fnmatch.fnmatchcase(piece, glob) for piece in name.split("/") for glob in source.exclude)

    return Found(root, list(filter(kept, found.names)), [entry for entry in found.left_out if kept(entry[0])])


def _file_parts(number: int, inputs: list[Input], part_bytes: int) -> list[Part]:
    parts, names, size = [], [], 0
    for item in inputs:
        names.append(item.name)
        size += item.size
        if size >= part_bytes:
            parts.append(Part(number, tuple(names), 0, len(names), size))
            names, size = [], 0
    return [*parts, Part(number, tuple(names), 0, len(names), size)] if names else parts


def _read_files(root: Path, part: Part, limit: int, advance: Advance) -> Iterator[Item]:
    for number, name in enumerate(part.names):
        size = (root / name).stat().st_size
        if size > limit:
            yield Skipped(number, f"a file of more than filters.max_row_bytes = {readable_size(limit)}")
        else:
            yield make_document(_without_mark((root / name).read_bytes()), number, path=name)
        advance(size)


def _without_mark(data: bytes) -> str | bytes:
    """Text without the mark that some editors begin files with; the mark also says where it is not UTF-8."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data.decode(encoding)
            except UnicodeError:
                return data
    return data
