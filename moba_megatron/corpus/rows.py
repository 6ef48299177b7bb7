"""From a row of a table to a document: filter columns, the text column, prompt and answer, or a conversation.

A prompt and its answer are encoded apart and then joined. So the prompt has the ids that it has when somebody sends it,
and no token covers the end of the prompt and the start of the answer, of which it could only be learned as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moba_megatron.corpus.chat import ChatTemplate
from moba_megatron.corpus.documents import Filtered, Incomplete, Item, Skipped, make_document, make_segmented
from moba_megatron.corpus.recipe import Filters, RowsSource


@dataclass(frozen=True)
class RowReader:
    """Makes documents of the rows of one source."""

    source: RowsSource
    filters: Filters
    template: ChatTemplate | None
    """Of the tokenizer; needed for `messages_column` only."""

    @property
    def columns(self) -> list[str]:
        """All columns that are read."""
        return [*self.source.columns, *self.filters.columns]

    def missing(self, present: Iterable[str]) -> list[str]:
        """The columns that are not among `present`."""
        present = set(present)
        return [column for column in self.columns if column not in present]

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        """What a row holds."""
        if absent := self.missing(row):
            return Incomplete(number, no_column(absent), tuple(row))
        for column, kept in self.filters.columns.items():
            if not isinstance(row[column], bool):
                return Skipped(number, f"{column} is {_named(row[column])}, not true or false")
            if row[column] is not kept:
                return Filtered(number)
        source = self.source
        if source.text_column is not None:
            return make_document(row[source.text_column], number)
        if source.messages_column is not None:
            assert self.template is not None, "read_part is given the template of the tokenizer"
            return self.template.document(row[source.messages_column], number)
        assert source.prompt_column is not None and source.answer_column is not None
        segments = []
        for column, counts in ((source.prompt_column, False), (source.answer_column, True)):
            value = row[column]
            if not isinstance(value, str | bytes):
                return Skipped(number, f"{column} is {_named(value)}, not a string")
            try:
                segments.append((value.decode() if isinstance(value, bytes) else value, counts))
            except UnicodeError as error:
                return Skipped(number, f"{column} is not UTF-8: {error.reason} at {error.start}")
        return make_segmented(segments, number)


def no_column(missing: list[str]) -> str:
    """Why a row or a table is of no use."""
    return f"no column {', '.join(map(repr, missing))}"


def missing_columns(where: str, reason: str, present: Iterable[str]) -> str:
    """Text of the error for rows at `where` that lack columns. `reason` is that of `no_column`."""
    known = ", ".join(sorted(present)) or "none"
    return f"{where}: {reason} (there are: {known}); correct the recipe's columns, such as text_column"


def _named(value: Any) -> str:
    return "null" if value is None else type(value).__name__
