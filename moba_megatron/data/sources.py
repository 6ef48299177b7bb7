"""Sources of text, cut into parts that can be read alone.

A source lists its inputs (files with sizes, or rows of a dataset) and is cut into *parts*: some small files, a byte
range of a JSONL file, row groups of a Parquet file, a range of rows. Parts depend on the inputs only, never on the
number of workers; read one after the other they give all documents in one fixed order. Compressed JSONL cannot be
entered in the middle: one file is one part. A part is read as a stream, so memory holds one record at a time.

What cannot be a document (bytes that are not UTF-8, a line that is not JSON, a row without text) comes out as `Skipped`
with its place and reason; what would make the corpus another one (a missing column, a truncated file) is an error.
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
import pyarrow.parquet

from moba_megatron.data.documents import CorpusError, Document, Input, Part, Skipped, make_document, missing_column
from moba_megatron.data.hf_datasets import dataset_input, dataset_parts, read_dataset
from moba_megatron.data.recipe import (
    DatasetsSource,
    FilesSource,
    JsonlSource,
    ParquetSource,
    SourceBase,
    StdlibSource,
)

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


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
            parts += _parquet_parts(number, item.name, part_bytes)
        elif Path(item.name).suffix in _COMPRESSION:
            parts.append(Part(number, (item.name,), 0, item.size, item.size))
        else:
            edges = [*range(0, item.size, part_bytes), item.size]
            parts += [Part(number, (item.name,), a, b, b - a) for a, b in zip(edges, edges[1:], strict=False)]
    return parts


def read_part(source: SourceBase, part: Part) -> Iterator[Document | Skipped]:
    """The documents of a part, in order.

    Raises:
        CorpusError: a missing column, a column that is not text, or a truncated file.
        OSError: the file system failed; reading again may succeed.
    """
    if isinstance(source, FilesSource | StdlibSource):
        return _read_files(files_root(source), part)
    if isinstance(source, JsonlSource):
        return _read_jsonl(source, part)
    if isinstance(source, ParquetSource):
        return _read_parquet(source, part)
    return read_dataset(source, part)


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


def _read_files(root: Path, part: Part) -> Iterator[Document | Skipped]:
    for name in part.names:
        yield make_document((root / name).read_bytes(), name, path=name)


def _read_jsonl(source: JsonlSource, part: Part) -> Iterator[Document | Skipped]:
    (path,) = part.names
    try:
        for place, line in _lines(path, part):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield Skipped(f"{path}:{place}", f"not JSON: {error}")
                continue
            if not isinstance(row, dict) or source.text_column not in row:
                raise CorpusError(missing_column(f"{path}:{place}", source, row if isinstance(row, dict) else ()))
            yield make_document(row[source.text_column], f"{path}:{place}")
    except OSError as error:
        # What the system reports has a number; what a decompressor finds in the bytes has none.
        if error.errno is not None:
            raise
        raise CorpusError(f"{path} cannot be read to its end ({error}): fetch it again or remove it") from error


def _lines(path: str, part: Part) -> Iterator[tuple[str, bytes]]:
    """Lines of a JSONL part with their places. A byte range owns the lines that start in it."""
    compression = _COMPRESSION.get(Path(path).suffix)
    if compression:
        # pyarrow reads files of several frames to their end and reports truncated ones; other readers do neither.
        with io.BufferedReader(pyarrow.input_stream(path, compression=compression)) as stream:
            yield from ((f"line {number}", line) for number, line in enumerate(stream, start=1))
        return
    with open(path, "rb") as stream:
        position = _seek_line(stream, part.start)
        while position < part.stop and (line := stream.readline()):
            yield f"byte {position}", line
            position += len(line)


def _seek_line(stream: BinaryIO, start: int) -> int:
    """Go to the first line that starts at byte `start` or after."""
    if start == 0:
        return 0
    stream.seek(start - 1)
    stream.readline()
    return stream.tell()


def _parquet_parts(number: int, path: str, part_bytes: int) -> list[Part]:
    metadata = pyarrow.parquet.read_metadata(path)
    parts, start, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= part_bytes or group == metadata.num_row_groups - 1:
            parts.append(Part(number, (path,), start, group + 1, size))
            start, size = group + 1, 0
    return parts


def _read_parquet(source: ParquetSource, part: Part) -> Iterator[Document | Skipped]:
    (path,) = part.names
    with pyarrow.parquet.ParquetFile(path) as file:
        kind = {field.name: field.type for field in file.schema_arrow}.get(source.text_column)
        if kind is None:
            raise CorpusError(missing_column(path, source, file.schema_arrow.names))
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise CorpusError(f"{path}: column {source.text_column!r} holds {kind}, not text; set text_column")
        row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
        groups = range(part.start, part.stop)
        for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[source.text_column]):
            # As bytes: a column of text may hold bytes that are not UTF-8, and one such row must not end the batch.
            for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                yield make_document(value, f"{path}: row {row}")
                row += 1
