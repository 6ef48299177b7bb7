"""Sources that Hugging Face `datasets` loads: saved to disk, local files, or the Hub, also as streams.

A dataset on disk is cut into ranges of rows; a stream into the shards that `datasets` reports, usually its files.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moba_megatron.corpus.documents import CorpusError, Input, Item, Part
from moba_megatron.corpus.jsonl import Advance
from moba_megatron.corpus.recipe import DatasetsSource
from moba_megatron.corpus.rows import RowReader, missing_columns, no_column
from moba_megatron.corpus.tables import ROWS_AT_ONCE, read_batches


def dataset_input(source: DatasetsSource) -> Input:
    """The dataset as the one input of its source.

    Raises:
        ValueError: it is not there, or has no rows.
        OSError: the network or the file system failed; loading again may succeed.
    """
    # The files may have changed since this process last looked.
    _open_dataset.cache_clear()
    data = open_dataset(source)
    if source.streaming:
        return Input(source.path, 0, f"stream of {data.num_shards} shards")
    if not len(data):
        raise ValueError(f"no documents: split {source.dataset_split!r} of {source.path} is empty")
    return Input(source.path, data.data.nbytes, data._fingerprint)


def dataset_parts(number: int, source: DatasetsSource, part_bytes: int) -> list[Part]:
    """Ranges of rows of about `part_bytes`, or the shards of a stream. `number` is the source's place in the recipe."""
    data = open_dataset(source)
    if source.streaming:
        return [Part(number, (), shard, shard + 1, 0) for shard in range(data.num_shards)]
    rows = len(data)
    step = -(-rows // max(1, -(-data.data.nbytes // part_bytes)))
    starts = range(0, rows, step)
    return [Part(number, (), start, min(start + step, rows), data.data.nbytes // len(starts)) for start in starts]


def read_dataset(source: DatasetsSource, reader: RowReader, part: Part, advance: Advance) -> Iterator[Item]:
    """The rows of a part, in order, numbered within the dataset or the shard of its stream.

    Raises:
        CorpusError: a missing column, or a stream that cannot be read to its end.
    """
    data = open_dataset(source)
    columns = data.column_names
    if columns is not None and (missing := reader.missing(columns)):
        raise CorpusError(missing_columns(source.path, no_column(missing), columns))
    if source.streaming:
        rows, first, place = data.shard(num_shards=data.num_shards, index=part.start), 0, f", shard {part.start}"
    else:
        wanted = data.select_columns(reader.wanted(columns))
        rows, first, place = wanted.select(range(part.start, part.stop)), part.start, ""
    # As Arrow: `datasets` would decode whole batches of text, and one row that is not UTF-8 would end the run.
    batches = rows.with_format("arrow").iter(ROWS_AT_ONCE)
    share = part.size / max(1, part.stop - part.start)
    readable = _readable_batches(batches, f"{source.path}{place}")
    yield from read_batches(reader, readable, first, lambda rows: advance(int(rows * share)))


def open_dataset(source: DatasetsSource) -> Any:
    """The `datasets.Dataset` (or `IterableDataset` when streaming) of a source; opened once a process."""
    return _open_dataset(source.model_dump_json())


@functools.lru_cache(maxsize=4)
def _open_dataset(source_json: str) -> Any:
    import datasets

    source = DatasetsSource.model_validate_json(source_json)
    folder = Path(source.path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = datasets.load_from_disk(source.path)
        if isinstance(saved, datasets.DatasetDict):
            if source.dataset_split not in saved:
                raise ValueError(f"{source.path} has no split {source.dataset_split!r}, only {', '.join(saved)}")
            saved = saved[source.dataset_split]
        return saved.to_iterable_dataset() if source.streaming else saved
    files = f" ({source.data_files})" if source.data_files else ""
    try:
        with _readable(f"{source.path}{files}"):
            return datasets.load_dataset(
                source.path,
                name=source.name,
                split=source.dataset_split,
                revision=source.revision,
                data_files=source.data_files,
                streaming=source.streaming,
            )
    except FileNotFoundError as error:
        raise ValueError(f"no documents: the library datasets cannot load {source.path}: {error}") from error


def _readable_batches(batches: Iterator[Any], where: str) -> Iterator[Any]:
    with _readable(where):
        yield from batches


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turn an error of `datasets` about unreadable data into an error of the corpus; one of the system stays."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except OSError:
        raise
    except (DatasetsError, ValueError) as error:
        # What went wrong in a file is the cause of "an error occurred while generating the dataset".
        cause = error.__cause__ or error
        if isinstance(cause, OSError):
            raise cause from error
        raise CorpusError(f"datasets cannot read {where}: {cause}") from error
