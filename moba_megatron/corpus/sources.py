"""Sources of text, cut into parts that can be read alone.

A source lists its inputs (files with sizes, or rows of a dataset) and is cut into *parts*: some small files, a byte
range of a JSONL file, row groups of a Parquet file, record batches of an Arrow file, a range of rows. Parts depend on
the inputs only, never on the number of workers; read one after the other they give all documents in one fixed order.
Compressed JSONL cannot be entered in the middle: one file is one part. A part is read as a stream, so memory holds one
record at a time.

What cannot be a document (bytes that are not UTF-8, a line that is not JSON, a row without text) comes out as `Skipped`
with its place and reason; what would make the corpus another one (a column of another type, a truncated file) is an
error. So is a column that no row of a source has, which one part cannot know: whoever reads all parts tells it from
the rows that came out as `Incomplete`. A part gives up by itself only when its first 1,000 rows are such.
"""

from __future__ import annotations

import fnmatch
import glob
import io
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow

from moba_megatron.corpus.chat import ChatTemplate
from moba_megatron.corpus.documents import MIB, CorpusError, Incomplete, Input, Item, Part, Skipped, make_document
from moba_megatron.corpus.hf_datasets import dataset_input, dataset_parts, read_dataset
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
from moba_megatron.corpus.rows import RowReader, missing_columns
from moba_megatron.corpus.tables import arrow_parts, parquet_parts, read_arrow, read_parquet

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_PATIENCE = 1000
"""Rows at the beginning of a part after which a column that none of them has is taken to be missing in all."""


def list_inputs(source: SourceBase) -> list[Input]:
    """The inputs of a source, in reading order.

    Raises:
        ValueError: nothing there.
    """
    if isinstance(source, DatasetsSource):
        return [dataset_input(source)]
    if isinstance(source, FilesSource | StdlibSource):
        root, names = files_root(source), _matching_files(source)
        paths = [(name, root / name) for name in names]
        where = f"{root} with pattern {source.pattern!r}"
    else:
        paths = [(name, Path(name)) for name in sorted(glob.glob(source.path, recursive=True)) if Path(name).is_file()]
        where = source.path
    if not paths:
        raise ValueError(f"no documents: no file matches {where}; check the path and the working directory")
    stats = [(name, path.stat()) for name, path in paths]
    return [Input(name, stat.st_size, str(stat.st_mtime_ns)) for name, stat in stats]


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
        elif Path(item.name).suffix in _COMPRESSION:
            parts.append(Part(number, (item.name,), 0, item.size, item.size))
        else:
            edges = [*range(0, item.size, part_bytes), item.size]
            parts += [Part(number, (item.name,), a, b, b - a) for a, b in zip(edges, edges[1:], strict=False)]
    return parts


def read_part(
    source: SourceBase, part: Part, filters: Filters | None = None, template: ChatTemplate | None = None
) -> Iterator[Item]:
    """The items of a part, in order.

    Args:
        filters: of the recipe; only its boolean columns are looked at here.
        template: of the tokenizer, for a source with `messages_column`.

    Raises:
        CorpusError: a missing column, a column of another type, or a truncated file.
        OSError: the file system failed; reading again may succeed.
    """
    if isinstance(source, FilesSource | StdlibSource):
        return _read_files(files_root(source), part)
    assert isinstance(source, RowsSource)
    reader = RowReader(source, filters or Filters(), template)
    if isinstance(source, JsonlSource):
        return _read_jsonl(reader, part)
    if isinstance(source, ParquetSource):
        return read_parquet(reader, part)
    if isinstance(source, ArrowSource):
        return read_arrow(reader, part)
    assert isinstance(source, DatasetsSource)
    return read_dataset(source, reader, part)


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


def _matching_files(source: FilesSource | StdlibSource) -> list[str]:
    root = files_root(source)
    if not root.is_dir():
        raise ValueError(f"no documents: {root} is not a folder; check the path and the working directory")
    names = sorted(path.relative_to(root).as_posix() for path in root.glob(source.pattern) if path.is_file())
    return [
        name
        for name in names
        if not any(fnmatch.fnmatchcase(piece, glob) for piece in name.split("/") for glob in source.exclude)
    ]


def _file_parts(number: int, inputs: list[Input], part_bytes: int) -> list[Part]:
    parts, names, size = [], [], 0
    for item in inputs:
        names.append(item.name)
        size += item.size
        if size >= part_bytes:
            parts.append(Part(number, tuple(names), 0, len(names), size))
            names, size = [], 0
    return [*parts, Part(number, tuple(names), 0, len(names), size)] if names else parts


def _read_files(root: Path, part: Part) -> Iterator[Item]:
    for number, name in enumerate(part.names):
        yield make_document((root / name).read_bytes(), number, path=name)


def _read_jsonl(reader: RowReader, part: Part) -> Iterator[Item]:
    (path,) = part.names
    missing, complete = 0, False
    try:
        for number, line in enumerate(_lines(path, part), start=1):
            if line.isspace():
                continue
            row = _json_object(line, number)
            if isinstance(row, Skipped):
                yield row
                continue
            items = reader.items(row, number)
            if isinstance(item := items[0], Incomplete):
                missing += 1
                if missing == _PATIENCE and not complete:
                    place = f"{path}: the first {missing} rows from byte {part.start} on"
                    raise CorpusError(missing_columns(place, item.reason, item.present))
            else:
                complete = True
            yield from items
    except OSError as error:
        # What the system reports has a number; what a decompressor finds in the bytes has none.
        if error.errno is not None:
            raise
        raise CorpusError(f"{path} cannot be read to its end ({error}): fetch it again or remove it") from error


def _json_object(line: bytes, number: int) -> dict | Skipped:
    try:
        row = json.loads(line)
    except ValueError as error:
        return Skipped(number, f"not JSON: {error}")
    except RecursionError:
        return Skipped(number, "not JSON that can be read: nested too deep")
    return row if isinstance(row, dict) else Skipped(number, f"a JSON {type(row).__name__}, not an object")


def _lines(path: str, part: Part) -> Iterator[bytes]:
    """Lines of a JSONL part. A byte range owns the lines that start in it."""
    compression = _COMPRESSION.get(Path(path).suffix)
    if compression:
        # pyarrow reads files of several frames to their end and reports truncated ones; other readers do neither.
        with io.BufferedReader(pyarrow.input_stream(path, compression=compression), MIB) as stream:
            yield from stream
        return
    with open(path, "rb", buffering=MIB) as stream:
        position = _seek_line(stream, part.start)
        while position < part.stop and (line := stream.readline()):
            yield line
            position += len(line)


def _seek_line(stream: BinaryIO, start: int) -> int:
    """Go to the first line that starts at byte `start` or after."""
    if start == 0:
        return 0
    stream.seek(start - 1)
    stream.readline()
    return stream.tell()
