"""JSON Lines: plain files by byte ranges, compressed ones as streams.

A row that is longer than the limit is passed over in pieces, so that a small file that unpacks to one endless line
costs no memory.
"""

from __future__ import annotations

import bz2
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import zstandard

from moba_megatron.corpus.documents import MIB, CorpusError, Incomplete, Item, Part, Skipped, whole_file
from moba_megatron.corpus.files import COMPRESSED, readable_size
from moba_megatron.corpus.rows import RowReader, missing_columns

Advance = Callable[[int], None]
"""Told of bytes of the input that were read since."""
_PATIENCE = 1000
"""Rows at the beginning of a part after which a column that none of them has is taken to be missing in all."""
_PIECE = 1024
"""Compressed bytes that are unpacked at once: at most some 32 MiB of output."""
_LARGEST_WINDOW = 2**31


def jsonl_parts(number: int, path: str, size: int, part_bytes: int) -> list[Part]:
    """Byte ranges of about `part_bytes`; the whole of a compressed file. `number` is the source's place in the
    recipe."""
    if _compression(path):
        return [Part(number, (path,), 0, size, size)]
    edges = [*range(0, size, part_bytes), size]
    return [Part(number, (path,), a, b, b - a) for a, b in zip(edges, edges[1:], strict=False)]


def read_jsonl(reader: RowReader, part: Part, advance: Advance) -> Iterator[Item]:
    """The rows of a part, numbered within it from 1.

    Raises:
        CorpusError: none of the first rows has the columns, the file is cut short, or it is one JSON list.
    """
    (path,) = part.names
    limit, missing, complete = reader.filters.max_row_bytes, 0, False
    with whole_file(path):
        for number, line in enumerate(_lines(path, part, limit, advance), start=1):
            if line is None:
                yield Skipped(number, f"a row of more than filters.max_row_bytes = {readable_size(limit)}")
                continue
            if line.isspace():
                continue
            row = _json_object(line, number)
            if isinstance(row, Skipped):
                if number == 1 and not part.start and line.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                    raise CorpusError(
                        f"{path} is one JSON list, not a row a line: read it with kind: datasets, path: json, "
                        f"data_files: {path}, or write it as JSON Lines"
                    )
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


def head_of(path: str, size: int) -> bytes:
    """The first bytes of a file, unpacked if its name says that it is compressed; none of one that cannot be."""
    with open(path, "rb") as file:
        if not _compression(path):
            return file.read(size)
        try:
            with io.BufferedReader(_unpacked(file, path), size) as stream:
                return stream.read(size)
        except OSError:
            return b""


def _json_object(line: bytes, number: int) -> dict | Skipped:
    try:
        row = json.loads(line)
    except ValueError as error:
        return Skipped(number, f"not JSON: {error}")
    except RecursionError:
        return Skipped(number, "unreadable JSON: nested too deep")
    return row if isinstance(row, dict) else Skipped(number, f"a JSON {type(row).__name__}, not an object")


def _lines(path: str, part: Part, limit: int, advance: Advance) -> Iterator[bytes | None]:
    """Lines of a part, None for one over the limit. A byte range owns the lines that start in it."""
    with open(path, "rb", buffering=MIB) as file:
        if _compression(path):
            with io.BufferedReader(_unpacked(file, path), MIB) as stream:
                done = 0
                while line := stream.readline(limit + 2):
                    _, line = _rest_of(line, stream, limit)
                    yield line
                    if file.tell() > done:
                        advance(file.tell() - done)
                        done = file.tell()
            return
        position = _seek_line(file, part.start)
        while position < part.stop and (line := file.readline(limit + 2)):
            size, line = _rest_of(line, file, limit)
            yield line
            position += size
            advance(size)


def _rest_of(line: bytes, stream: BinaryIO | io.BufferedReader, limit: int) -> tuple[int, bytes | None]:
    """(bytes of a line, the line or None where it goes on over the limit); passes over what is left of it."""
    size = len(line)
    if len(line.rstrip(b"\r\n")) <= limit:
        return size, line
    while not line.endswith(b"\n") and (line := stream.readline(MIB)):
        size += len(line)
    return size, None


def _seek_line(stream: BinaryIO, start: int) -> int:
    """Go to the first line that starts at byte `start` or after."""
    if start == 0:
        return 0
    stream.seek(start - 1)
    while (piece := stream.readline(MIB)) and not piece.endswith(b"\n"):
        pass
    return stream.tell()


def _compression(path: str) -> str | None:
    ending = Path(path).suffix.lower()
    return ending if ending in COMPRESSED else None


def _unpacked(file: BinaryIO, path: str) -> io.RawIOBase:
    """Streams of several members are read to their end, and one that is cut short is an error."""
    ending = _compression(path)
    assert ending is not None, "only compressed files are unpacked"
    if ending == ".gz":
        return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "gzip")
    return _Unpacked(file, ending)


class _Unpacked(io.RawIOBase):
    """A file of one or several compressed streams. Readers of the libraries stop without a word where a further stream
    is damaged, and pyarrow refuses the windows of zstd that `--long` makes."""

    def __init__(self, file: BinaryIO, ending: str):
        self._file, self._ending = file, ending
        self._stream: Any = None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._output:
            piece = self._input or self._file.read(_PIECE)
            self._input = b""
            if not piece:
                if self._stream is not None:
                    raise OSError("the last compressed stream is cut short")
                return 0
            if self._stream is None:
                # xz pads streams by zeros.
                piece = piece.lstrip(b"\0") if self._ending == ".xz" else piece
                if not piece:
                    continue
                self._stream = _decompressor(self._ending)
            try:
                self._output = memoryview(self._stream.decompress(piece))
            except (zstandard.ZstdError, lzma.LZMAError, OSError, ValueError) as error:
                raise OSError(f"a compressed stream is damaged: {error}") from error
            if self._stream.eof:
                self._stream, self._input = None, self._stream.unused_data
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count


def _decompressor(ending: str) -> Any:
    if ending == ".zst":
        return zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
    return bz2.BZ2Decompressor() if ending == ".bz2" else lzma.LZMADecompressor()
