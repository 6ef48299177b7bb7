"""From a row of a table to a document: filter columns, the text column, prompt and answer, or a conversation.

A prompt and its answer are one text, which is encoded as a whole: a tokenizer may begin every text with a space of its
own, which the middle of a text must not have. Where a token covers the end of the prompt and the start of the answer,
the document does not begin with the ids of the prompt alone; the manifest counts such documents.
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

    def wanted(self, present: Iterable[str]) -> list[str]:
        """What is to be read of a table with these columns."""
        present = set(present)
        return [*self.columns, *(column for column in self.source.optional_columns if column in present)]

    def missing(self, present: Iterable[str]) -> list[str]:
        """The columns that are not among `present`."""
        present = set(present)
        return [column for column in self.columns if column not in present]

    def items(self, row: Mapping[str, Any], number: int) -> list[Item]:
        """What a row holds: one document, or several of one conversation, or why it is left out."""
        left_out = self._left_out(row, number)
        if left_out is not None:
            return [left_out]
        source = self.source
        if source.text_column is not None:
            return [make_document(row[source.text_column], number)]
        if source.messages_column is not None:
            assert self.template is not None, "read_part is given the template of the tokenizer"
            tools = row.get(source.tools_column or "tools")
            return [
                *self.template.documents(row[source.messages_column], number, tools, row.get("chat_template_kwargs"))
            ]
        return [self._prompt_and_answer(row, number)]

    def _left_out(self, row: Mapping[str, Any], number: int) -> Item | None:
        if absent := self.missing(row):
            return Incomplete(number, no_column(absent), tuple(row))
        for column, kept in self.filters.columns.items():
            if not isinstance(row[column], bool):
                return Skipped(number, f"{column} is {_named(row[column])}, not true or false")
            if row[column] is not kept:
                return Filtered(number)
        return None

    def _prompt_and_answer(self, row: Mapping[str, Any], number: int) -> Item:
        source = self.source
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
    return f"{where}: {reason} (columns: {known}); correct the recipe's columns, such as text_column"


def _named(value: Any) -> str:
    return "null" if value is None else type(value).__name__
