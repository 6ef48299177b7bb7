"""Parquet and Arrow files, cut into parts by row groups and record batches.

Arrow files come in two kinds. One has a footer, so that any record batch can be read alone; the other is a stream,
which `datasets` writes, and makes one part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

from moba_megatron.corpus.documents import CorpusError, Incomplete, Item, Part, Skipped, whole_file
from moba_megatron.corpus.files import readable_size
from moba_megatron.corpus.jsonl import Advance
from moba_megatron.corpus.rows import RowReader, missing_columns, no_column

_ARROW_FILE_MAGIC = b"ARROW1"
_TOO_LONG = object()
ROWS_AT_ONCE = 256
"""Rows that are in memory as Python objects at a time."""


def parquet_parts(number: int, path: str, part_bytes: int) -> list[Part]:
    """Ranges of row groups of about `part_bytes`. `number` is the source's place in the recipe."""
    with whole_file(path, pyarrow.ArrowInvalid):
        metadata = pyarrow.parquet.read_metadata(path)
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    return _ranges(number, path, sizes, part_bytes)


def read_parquet(reader: RowReader, part: Part, advance: Advance) -> Iterator[Item]:
    """The rows of a part, numbered within the file."""
    (path,) = part.names
    with whole_file(path, pyarrow.ArrowInvalid), pyarrow.parquet.ParquetFile(path) as file:
        _check_columns(path, reader, file.schema_arrow)
        sizes = [file.metadata.row_group(group).num_rows for group in range(part.stop)]
        first = sum(sizes[: part.start])
        groups, columns = range(part.start, part.stop), reader.wanted(file.schema_arrow.names)
        batches = file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=columns)
        share = part.size / max(1, sum(sizes[part.start :]))
        yield from read_batches(reader, batches, first, lambda rows: advance(int(rows * share)))


def arrow_parts(number: int, path: str, size: int, part_bytes: int) -> list[Part]:
    """Ranges of record batches of about `part_bytes`, or the whole of a stream. `size` is that of the file in bytes."""
    if not _has_footer(path):
        return [Part(number, (path,), 0, 1, size)]
    with whole_file(path, pyarrow.ArrowInvalid), pyarrow.memory_map(path) as stream:
        batches = pyarrow.ipc.open_file(stream).num_record_batches
    return _ranges(number, path, [size // max(1, batches)] * batches, part_bytes)


def read_arrow(reader: RowReader, part: Part, advance: Advance) -> Iterator[Item]:
    """The rows of a part, numbered within the file."""
    (path,) = part.names
    with whole_file(path, pyarrow.ArrowInvalid), pyarrow.memory_map(path) as stream:
        if _has_footer(path):
            file = pyarrow.ipc.open_file(stream)
            _check_columns(path, reader, file.schema)
            first = sum(file.get_batch(batch).num_rows for batch in range(part.start))
            batches = (file.get_batch(batch) for batch in range(part.start, part.stop))
        else:
            file = pyarrow.ipc.open_stream(stream)
            _check_columns(path, reader, file.schema)
            first, batches = 0, iter(file)
        yield from read_batches(reader, _small(batches, advance, part), first)


def _small(batches: Iterator[pyarrow.RecordBatch], advance: Advance, part: Part) -> Iterator[pyarrow.RecordBatch]:
    # All batches of a file with a footer are taken to be alike; of a stream nobody knows how many there are.
    share = part.size // (part.stop - part.start)
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            yield batch.slice(start, ROWS_AT_ONCE)
        advance(min(share, batch.nbytes))


def read_batches(
    reader: RowReader,
    batches: Iterable[pyarrow.RecordBatch | pyarrow.Table],
    first: int,
    advance: Advance = lambda rows: None,
) -> Iterator[Item]:
    """The rows of batches, numbered from `first` on. `advance` is told of rows that were read since."""
    number = first
    for batch in batches:
        columns = [column for column in reader.columns if column in batch.schema.names]
        if len(columns) < len(reader.columns):
            # All rows alike, and there may be none of the columns to go along.
            absent, present = no_column(reader.missing(columns)), tuple(batch.schema.names)
            yield from (Incomplete(number + row, absent, present) for row in range(batch.num_rows))
            number += batch.num_rows
            continue
        columns = reader.wanted(batch.schema.names)
        limit = reader.filters.max_row_bytes
        for row in zip(*(_values(batch.column(column), limit) for column in columns), strict=True):
            if any(value is _TOO_LONG for value in row):
                yield Skipped(number, f"a text of more than filters.max_row_bytes = {readable_size(limit)}")
            else:
                yield from reader.items(dict(zip(columns, row, strict=True)), number)
            number += 1
        advance(batch.num_rows)


def _values(column: pyarrow.Array | pyarrow.ChunkedArray, limit: int) -> list[Any]:
    """The values of a column; `_TOO_LONG` for texts of more than `limit` bytes, which are never copied."""
    if isinstance(column, pyarrow.ChunkedArray):
        return [value for chunk in column.chunks for value in _values(chunk, limit)]
    if pyarrow.types.is_dictionary(column.type):
        # Each entry once, however many rows have it.
        entries = _values(column.dictionary, limit)
        return [None if place is None else entries[place] for place in column.indices.to_pylist()]
    if _is_text(column.type):
        # As bytes: a column of text may hold bytes that are not UTF-8, and one such row must not end the batch.
        binary = (column.storage if _is_json(column.type) else column).cast(pyarrow.large_binary())
        sizes = pyarrow.compute.binary_length(binary).to_pylist()
        return [
            _TOO_LONG if size is not None and size > limit else value.as_py()
            for size, value in zip(sizes, binary, strict=True)
        ]
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [_value(value) for value in column]
    if not pyarrow.types.is_nested(column.type):
        return values
    if _has_json(column.type):
        values = [_unpacked(value, column.type) for value in values]
    values = [_without_padding(value) for value in values]
    if column.nbytes <= limit:
        return values
    return [_TOO_LONG if column.slice(place, 1).nbytes > limit else value for place, value in enumerate(values)]


def _is_json(kind: pyarrow.DataType) -> bool:
    """`datasets` writes values as JSON where rows differ in shape."""
    return getattr(kind, "extension_name", None) == "arrow.json"


def _has_json(kind: pyarrow.DataType) -> bool:
    return _is_json(kind) or any(_has_json(kind.field(place).type) for place in range(kind.num_fields))


def _unpacked(value: Any, kind: pyarrow.DataType) -> Any:
    """A nested value with what its type keeps as JSON as values."""
    if value is None or not _has_json(kind):
        return value
    if _is_json(kind):
        try:
            return json.loads(value)
        except ValueError:
            return value
    if isinstance(value, dict):
        return {key: _unpacked(inner, kind.field(key).type) for key, inner in value.items()}
    return [_unpacked(inner, kind.field(0).type) for inner in value]


def _without_padding(value: Any) -> Any:
    """A nested value without the keys that are null: a column gives each of its values all keys that one of them
    has."""
    if isinstance(value, dict):
        return {key: _without_padding(inner) for key, inner in value.items() if inner is not None}
    return [_without_padding(inner) for inner in value] if isinstance(value, list) else value


def _value(value: pyarrow.Scalar) -> Any:
    """A nested value, or None, which no row may hold, where text in it is not UTF-8."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


def _check_columns(path: str, reader: RowReader, schema: pyarrow.Schema) -> None:
    missing = reader.missing(schema.names)
    if missing:
        raise CorpusError(missing_columns(path, no_column(missing), schema.names))
    for column in reader.columns:
        if schema.names.count(column) > 1:
            raise CorpusError(f"{path}: there are {schema.names.count(column)} columns {column!r}: rename one")
        kind = schema.field(column).type
        if column in reader.filters.columns:
            right, wanted = pyarrow.types.is_boolean(kind), "true or false"
        elif column == reader.source.messages_column:
            lists = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
            right, wanted = lists or _is_text(kind), "lists of messages"
        elif column == reader.source.tools_column:
            continue
        else:
            right, wanted = _is_text(kind), "text"
        if not right:
            raise CorpusError(f"{path}: column {column!r} holds {kind}, not {wanted}; name another column")


def _is_text(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if _is_json(kind):
        return True
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return text or types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _has_footer(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC


def _ranges(number: int, path: str, sizes: list[int], part_bytes: int) -> list[Part]:
    """Neighbours joined until they have `part_bytes`."""
    parts, start, size = [], 0, 0
    for place, own in enumerate(sizes):
        size += own
        if size >= part_bytes or place == len(sizes) - 1:
            parts.append(Part(number, (path,), start, place + 1, size))
            start, size = place + 1, 0
    return parts
