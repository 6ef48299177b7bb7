"""Corpus recipes: the text, the choice of documents, the tokenizer, and the share for validation.

A recipe is a YAML file in `data/` (or a `Recipe` made in Python), as strict as the training configuration: an unknown
key, a wrong type or an impossible value is an error that names the key. Overrides are `key.path=value`; members of a
list are addressed by their number (`sources.0.path=...`). Paths are relative to the working directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from moba_megatron.config import ConfigError, Section
from moba_megatron.config.load import explain
from moba_megatron.config.overrides import refuse_missing, resolved, with_override
from moba_megatron.config.reading import read_tree
from moba_megatron.corpus.chat_options import Chat

S = TypeVar("S", bound=Section)
SplitChoice = Literal["hash", "train", "validation"]


class SourceBase(Section):
    split: SplitChoice = "hash"
    """`hash`: each document goes to training or validation by a hash (see `split.validation`). `train` or `validation`:
    the whole source goes there."""


class FilesSource(SourceBase):
    """A folder of UTF-8 text files; each file is one document, named by its path relative to the folder."""

    kind: Literal["files"]
    path: str
    """Folder."""
    pattern: str = "**/*.txt"
    """Which files, as a glob relative to the folder; `**` is any depth."""
    exclude: list[str] = []
    """Leave out a file when its name, or the name of any folder between it and `path`, matches one of these globs."""


class StdlibSource(SourceBase):
    """The standard library of the running Python: real source code on every machine, with some long files."""

    kind: Literal["python_stdlib"]
    pattern: str = "**/*.py"
    """As in `files`."""
    exclude: list[str] = []
    """As in `files`."""


class RowsSource(SourceBase):
    """The base of sources with rows: the columns that make a document.

    Either `text_column`, or `prompt_column` with `answer_column`, or `messages_column`. The last two make data with a
    loss mask. With a prompt and an answer only the answer counts. With a conversation, written by the tokenizer's chat
    template, only the assistant's turns count.
    """

    text_column: str | None = None
    """Column of the text. Default: `text`, unless the other columns are named."""
    prompt_column: str | None = None
    """Column of the prompt, which does not count in the loss."""
    answer_column: str | None = None
    """Column of the answer, which counts in the loss."""
    messages_column: str | None = None
    """Column of a list of messages, each with `role` and `content` (or `from` and `value`). Rows may also have `tools`
    (in the tools column) and `chat_template_kwargs` for the template."""
    tools_column: str | None = None
    """Column of the tools of a conversation, a list of JSON schemas. Default: `tools`, in rows that have it."""

    @model_validator(mode="after")
    def _one_way(self) -> RowsSource:
        if (self.prompt_column is None) != (self.answer_column is None):
            raise ValueError("prompt_column and answer_column go together: name both or neither")
        ways = [self.text_column, self.prompt_column, self.messages_column]
        if sum(way is not None for way in ways) > 1:
            raise ValueError("name only one of text_column, prompt_column with answer_column, and messages_column")
        if not any(ways):
            self.text_column = "text"
        if self.tools_column is not None and self.messages_column is None:
            raise ValueError("tools_column belongs to messages_column: name both")
        return self

    @property
    def columns(self) -> list[str]:
        """The columns that make a document."""
        every = (self.text_column, self.prompt_column, self.answer_column, self.messages_column, self.tools_column)
        return [column for column in every if column is not None]

    @property
    def optional_columns(self) -> list[str]:
        """Columns that are read where rows have them."""
        if self.messages_column is None:
            return []
        return [*(["tools"] if self.tools_column is None else []), "chat_template_kwargs"]

    @property
    def masked(self) -> bool:
        """Whether some tokens of its documents do not count in the loss."""
        return self.text_column is None


class JsonlSource(RowsSource):
    """JSON Lines files, plain or compressed (`.gz`, `.zst`, `.bz2`, `.xz`); each line is one document."""

    kind: Literal["jsonl"]
    path: str
    """A file, a folder, or a pattern (`**` is any depth)."""


class ParquetSource(RowsSource):
    """Parquet files; each row is one document."""

    kind: Literal["parquet"]
    path: str
    """A file, a folder, or a pattern (`**` is any depth)."""


class ArrowSource(RowsSource):
    """Arrow files, of either kind: with a footer (random access, Feather) or streams, as `datasets` writes them; each
    row is one document."""

    kind: Literal["arrow"]
    path: str
    """A file, a folder, or a pattern (`**` is any depth)."""


class DatasetsSource(RowsSource):
    """Anything that Hugging Face `datasets` loads; each row is one document."""

    kind: Literal["datasets"]
    path: str
    """A name on the Hub, a builder (`json`, `parquet`, ...) with `data_files`, a local folder of data files, or a
    folder written by `save_to_disk`."""
    name: str | None = None
    """Configuration of the dataset, where it has several."""
    dataset_split: str = "train"
    """Which split of the dataset, in the syntax of `datasets` (`train`, `train[:10%]`)."""
    revision: str | None = None
    """Commit or tag on the Hub. Name one to make a recipe repeatable."""
    data_files: str | list[str] | None = None
    """As in `datasets.load_dataset`."""
    streaming: bool = False
    """Read while downloading instead of downloading first. Row order is that of the files."""


Source = Annotated[
    FilesSource | StdlibSource | JsonlSource | ParquetSource | ArrowSource | DatasetsSource,
    Field(discriminator="kind"),
]


Begin = Annotated[str, Field(min_length=1)]


class TrainedTokenizer(Section):
    """A byte-level BPE trained on the training documents of the recipe, with `<|endoftext|>` as id 0."""

    kind: Literal["bpe"]
    vocab_size: int = Field(ge=257, le=2**24)
    """Entries, the 256 bytes and the end-of-document token included."""
    max_training_bytes: int | None = Field(default=None, ge=1)
    """Train only on this many first bytes of the corpus, in the order of the sources. None: on all of it, which needs a
    second pass and memory for the distinct words."""
    engine: Literal["auto", "tokenizers"] = "auto"
    """The library that encodes. `auto`: gigatoken if it is installed, supports the tokenizer and gives the same ids as
    `tokenizers` on a sample of every shard; else `tokenizers`."""


class PretrainedTokenizer(Section):
    """A Hugging Face tokenizer on disk."""

    kind: Literal["pretrained"]
    path: str
    """Folder with `tokenizer.json`."""
    end_of_document: str | None = None
    """Token that ends each document. None: `<|endoftext|>` if the tokenizer has it, else its `eos_token`."""
    begin_of_document: Literal["auto", "none"] | Begin = "auto"
    """How documents begin. `auto`: prompts begin with the tokenizer's own first token, such as `<|begin_of_text|>`, if
    it has one; nothing is added to plain texts. `none`: nothing is added. Anything else is the first token of all
    documents. Conversations always begin as their chat template says."""
    engine: Literal["auto", "tokenizers"] = "auto"
    """As in `bpe`."""


class Filters(Section):
    """Which documents are kept; the manifest counts the others."""

    min_characters: int = Field(default=1, ge=1)
    """Shortest document."""
    max_characters: int | None = Field(default=None, ge=1)
    """Longest document. None: no limit; documents are never cut."""
    min_tokens: int | None = Field(default=None, ge=1)
    """Shortest document in tokens, its end-of-document token included."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest document in tokens, its end-of-document token included."""
    max_row_bytes: int = Field(default=64 * 2**20, ge=1)
    """Longest row (a line of JSONL, a text in a table) or file, in bytes. Longer ones are skipped and listed, before
    they are in memory as a whole."""
    keep_column: str | None = None
    """Boolean column of the rows: rows with true are kept."""
    drop_column: str | None = None
    """Boolean column of the rows: rows with false are kept."""
    exact_duplicates: Literal["keep", "drop"] = "keep"
    """`drop`: keep only the first of several documents with the same text, over all sources and both splits, in the
    order of the sources and their documents."""

    @model_validator(mode="after")
    def _rising(self) -> Filters:
        for unit in ("characters", "tokens"):
            least, most = getattr(self, f"min_{unit}") or 0, getattr(self, f"max_{unit}")
            if most is not None and most < least:
                raise ValueError(f"max_{unit} = {most} is below min_{unit} = {least}: nothing would be kept")
        return self

    @property
    def columns(self) -> dict[str, bool]:
        """Boolean columns, with the value that keeps a row."""
        wanted = ((self.keep_column, True), (self.drop_column, False))
        return {column: value for column, value in wanted if column is not None}


class Split(Section):
    """How documents of sources with `split: hash` are divided: by a hash of the file's relative path, or for rows of
    the text. So order, machine and number of workers do not matter, and equal rows are never in both splits."""

    validation: float = Field(default=0.05, ge=0, lt=1)
    """Share of the documents (not of the tokens) for validation."""


class Recipe(Section):
    """A corpus."""

    sources: list[Source] = Field(min_length=1)
    """Where the text comes from; the documents keep this order."""
    tokenizer: Annotated[TrainedTokenizer | PretrainedTokenizer, Field(discriminator="kind")]
    """The tokenizer."""
    chat: Chat = Chat()
    """How conversations are written."""
    filters: Filters = Filters()
    """Which documents are kept."""
    split: Split = Split()
    """Which documents go to validation."""

    @model_validator(mode="after")
    def _sources_serve(self) -> Recipe:
        for number, source in enumerate(self.sources):
            if self.filters.columns and not isinstance(source, RowsSource):
                raise ValueError(
                    f"filters.{'keep' if self.filters.keep_column else 'drop'}_column needs rows, but sources.{number} "
                    f"is of kind {source.kind}, which has no columns: give it a recipe of its own"
                )
            if isinstance(source, RowsSource) and source.messages_column and self.tokenizer.kind == "bpe":
                raise ValueError(
                    f"sources.{number}.messages_column needs a chat template, but a newly trained tokenizer has none: "
                    f"use tokenizer.kind = pretrained"
                )
        begin = self.tokenizer.begin_of_document if isinstance(self.tokenizer, PretrainedTokenizer) else "auto"
        if begin not in ("auto", "none") and not self.texts and not self.prompts:
            raise ValueError(
                f"tokenizer.begin_of_document = {begin!r} has no effect: conversations begin as their chat template "
                "says"
            )
        if self.chat != Chat() and not self.chats:
            raise ValueError("chat has no effect: no source has a messages_column")
        return self

    @property
    def texts(self) -> bool:
        """Whether some source holds plain texts."""
        return any(not isinstance(source, RowsSource) or not source.masked for source in self.sources)

    @property
    def prompts(self) -> bool:
        """Whether some source holds prompts with answers."""
        return any(isinstance(source, RowsSource) and source.prompt_column for source in self.sources)

    @property
    def chats(self) -> bool:
        """Whether some source holds conversations."""
        return any(isinstance(source, RowsSource) and source.messages_column for source in self.sources)

    @property
    def masked(self) -> bool:
        """Whether some tokens do not count in the loss, so that the data needs a loss mask."""
        return any(isinstance(source, RowsSource) and source.masked for source in self.sources)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from YAML and apply `key.path=value` overrides.

    Raises:
        ConfigError: with one line for each unknown key, wrong type or impossible value.
    """
    return load_section(Recipe, path, overrides)


def recipe_from_dict(values: Any, overrides: list[str] | None = None) -> Recipe:
    """A checked `Recipe` from plain values, with `key.path=value` overrides as in `load_recipe`."""
    if not overrides:
        return _checked(Recipe, values)
    return _overridden(Recipe, values, overrides)


def load_section(schema: type[S], path: str | Path, overrides: list[str] | None = None) -> S:
    """Read any of these schemas from YAML, as `load_recipe` does."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError([f"no such recipe: {path}"])
    values = read_tree(path)
    if not isinstance(values, dict):
        raise ConfigError([f"{path} must hold a mapping with the keys {', '.join(schema.model_fields)}"])
    return _overridden(schema, values, overrides or [])


def _overridden(schema: type[S], values: Any, overrides: list[str]) -> S:
    for override in overrides:
        values = with_override(values, override, schema)
    values = resolved(values)
    refuse_missing(values)
    return _checked(schema, values)


def _checked(schema: type[S], values: Any) -> S:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_explain(item, schema) for item in error.errors()]) from error


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe that decide the dataset, as plain values: all except the encoding engine."""
    return recipe.model_dump(mode="json", exclude={"tokenizer": {"engine"}})


def _explain(error: Any, schema: type[Section]) -> str:
    """As `explain`, without the value where that is a whole mapping."""
    if error["type"] not in ("missing", "union_tag_not_found", "value_error"):
        return explain(error, schema)
    key = ".".join(str(part) for part in error["loc"])
    why = (
        str(error["ctx"]["error"]) if error["type"] == "value_error" else f"{error['msg'][0].lower()}{error['msg'][1:]}"
    )
    return f"{key}: {why}" if key else why
