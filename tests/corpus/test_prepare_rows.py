"""Rows with prompts and answers, conversations and boolean columns, in every kind of source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pydantic import TypeAdapter

from moba_megatron.config import ConfigError
from moba_megatron.corpus.documents import CorpusError, Document, Filtered, Incomplete, Item, Skipped
from moba_megatron.corpus.indexed import load_index
from moba_megatron.corpus.inspect import TextPiece, check_dataset, read_document
from moba_megatron.corpus.loss_mask import open_loss_mask
from moba_megatron.corpus.prepare import prepare
from moba_megatron.corpus.recipe import Filters, Recipe, Source, recipe_from_dict
from moba_megatron.corpus.sources import list_inputs, list_parts, read_part
from moba_megatron.corpus.tokenizer import Tokenizer, copy_tokenizer

ROWS = [
    {"question": "Where is the sea?", "reply": " Down the road.", "good": True, "text": "a"},
    {"question": "", "reply": "No question came before.", "good": True, "text": "b"},
    {"question": "And then?", "reply": " Left.", "good": False, "text": "c"},
    {"question": "Anything else?", "reply": "", "good": True, "text": "d"},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: "
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}U: {{ m.content }}{% endif %} {% endfor %}"
)
FORGETS = (
    "{% for m in messages[-2:] %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A{% endif %}"
)


def write_rows(folder: Path, kind: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    """The rows as a file of a kind; the source that reads it."""
    table, path = pyarrow.Table.from_pylist(rows), folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=1)
    elif kind == "arrow":
        pyarrow.feather.write_feather(table, str(path), compression="uncompressed", chunksize=1)
    elif kind == "stream":
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        kind = "arrow"
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return {"kind": kind, "path": str(path)}


def read_all(source: dict[str, Any], filters: Filters | None = None, part_bytes: int = 1) -> list[Item]:
    checked = TypeAdapter(Source).validate_python(source)
    parts = list_parts(0, checked, list_inputs(checked), part_bytes)
    return [item for part in parts for item in read_part(checked, part, filters)]


def rows_recipe(tokenizer: Tokenizer | Path, source: dict[str, Any], **more: Any) -> Recipe:
    folder = tokenizer.folder if isinstance(tokenizer, Tokenizer) else tokenizer
    return recipe_from_dict({
        "sources": [source],
        "tokenizer": {"kind": "pretrained", "path": str(folder)},
        "split": {"validation": 0.0},
        **more,
    })  # fmt: skip


@pytest.fixture
def chat_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "chat_tokenizer"
    copy_tokenizer(tokenizer.folder, folder, None)
    changed = Tokenizer(folder).backend
    changed.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    changed.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "stream", "datasets"])
def test_every_source_reads_texts_prompts_and_boolean_columns(tmp_path: Path, kind: str):
    source = write_rows(tmp_path, kind, ROWS)
    assert [item.text for item in read_all(source)] == ["a", "b", "c", "d"]
    for filters, kept in ((Filters(keep_column="good"), "abd"), (Filters(drop_column="good"), "c")):
        items = read_all(source, filters)
        assert "".join(item.text for item in items if isinstance(item, Document)) == kept
        assert sum(isinstance(item, Filtered) for item in items) == 4 - len(kept)
    first, second, third, fourth = read_all(source | {"prompt_column": "question", "answer_column": "reply"})
    assert first.segments == (("Where is the sea?", False), (" Down the road.", True))
    assert second.segments == (("No question came before.", True),)
    assert third.text == "And then? Left."
    assert isinstance(fourth, Skipped) and "answer is empty" in fourth.reason
    wrong = {"text_column": "body"}
    if kind == "jsonl":
        # A part of JSONL cannot know whether other parts have the columns.
        items = read_all(source | wrong, Filters(keep_column="ok"))
        assert {item.reason for item in items if isinstance(item, Incomplete)} == {"no column 'body', 'ok'"}
        return
    with pytest.raises(CorpusError, match="no column 'body', 'ok'"):
        read_all(source | wrong, Filters(keep_column="ok"))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_columns_of_the_wrong_type_and_cut_files_are_errors(tmp_path: Path, kind: str):
    source = write_rows(tmp_path, kind, ROWS)
    with pytest.raises(CorpusError, match="column 'text' holds string, not true or false"):
        read_all(source, Filters(keep_column="text"))
    with pytest.raises(CorpusError, match="column 'good' holds bool, not text"):
        read_all(source | {"text_column": "good"})
    path = Path(source["path"])
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CorpusError, match=f"{path.name} cannot be read to its end"):
        read_all(source)


def test_a_row_without_a_boolean_is_listed(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "good": true}\n{"text": "b", "good": 1}\n{"text": "c"}\n')
    source = {"kind": "jsonl", "path": str(path)}
    first, second, third = read_all(source, Filters(keep_column="good"), part_bytes=2**30)
    assert first.text == "a"
    assert second == Skipped(2, "good is int, not true or false") and third == Incomplete(
        3, "no column 'good'", ("text",)
    )


def lines_of(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("trained", [False, True])
def test_rows_without_a_column_end_the_run_only_if_no_row_of_their_source_has_it(
    tokenizer: Tokenizer, tmp_path: Path, trained: bool
):
    """The last row of the first file is alone in its part; the second file has nothing but such a row."""
    rows = [{"text": f"some words {n} " * 40} for n in range(2000)]
    lines_of(tmp_path / "a1.jsonl", [*rows, {"text": "x " * 2**19}, {"title": "none"}])
    lines_of(tmp_path / "a2.jsonl", [{"body": "none"}])
    recipe = rows_recipe(tokenizer, {"kind": "jsonl", "path": str(tmp_path / "a*.jsonl")})
    if trained:
        recipe = recipe_from_dict(recipe.model_dump() | {"tokenizer": {"kind": "bpe", "vocab_size": 260}})
    manifest = prepare(recipe, tmp_path / "out", workers=1)
    assert manifest.splits["train"].documents == 2001
    assert [entry.name.rpartition("/")[2] for entry in manifest.skipped] == ["a1.jsonl:line 2002", "a2.jsonl:line 1"]
    # As a source of its own, the second file has no such column.
    sources = [{"kind": "jsonl", "path": str(tmp_path / f"a{n}.jsonl")} for n in (1, 2)]
    with pytest.raises(CorpusError, match=r"a2.jsonl:line 1: no column 'text' \(columns: body\); correct"):
        prepare(recipe_from_dict(recipe.model_dump() | {"sources": sources}), tmp_path / "two", workers=1)


def test_text_with_an_end_of_document_token_that_is_not_special_is_listed(tokenizer: Tokenizer, tmp_path: Path):
    source = {"kind": "jsonl", "path": str(tmp_path / "a.jsonl"), "prompt_column": "q", "answer_column": "a"}
    lines_of(tmp_path / "a.jsonl", [{"q": "Who? ", "a": f"{n} {'!' * (n in (1, 3))}{n}"} for n in range(5)])
    recipe = rows_recipe(tokenizer, source, filters={"min_tokens": 1})
    spec = recipe.tokenizer.model_dump() | {"end_of_document": "!"}
    recipe = recipe_from_dict(recipe.model_dump() | {"tokenizer": spec})
    manifest = prepare(recipe, tmp_path / "out", workers=1)
    assert (manifest.splits["train"].documents, manifest.skipped_total, manifest.filtered) == (3, 2, 0)
    assert [entry.name for entry in manifest.skipped] == [f"{source['path']}:line {n}" for n in (2, 4)]
    assert manifest.skipped[0].reason.startswith("contains '!', the end-of-document token, which cannot be read as")
    ids = np.fromfile(tmp_path / "out/train.bin", np.uint16)
    assert np.count_nonzero(ids == tokenizer.backend.token_to_id("!")) == 3
    assert all(wrong is None for _, wrong in check_dataset(tmp_path / "out"))


def test_answers_are_learned_and_prompts_are_not(tokenizer: Tokenizer, tmp_path: Path):
    source = write_rows(tmp_path, "jsonl", ROWS) | {"prompt_column": "question", "answer_column": "reply"}
    plain = tmp_path / "plain.txt"
    plain.write_text("plain text")
    recipe = rows_recipe(tokenizer, source)
    recipe = recipe_from_dict(
        recipe.model_dump() | {"sources": [source, {"kind": "files", "path": str(tmp_path), "pattern": "plain.txt"}]}
    )
    manifest = prepare(recipe, tmp_path / "out", workers=1)
    indexed, eod = IndexedDataset(str(tmp_path / "out/train")), [tokenizer.eod_id]
    mask = np.split(np.array(open_loss_mask(tmp_path / "out/train")), np.cumsum(indexed.sequence_lengths)[:-1])
    expected = [(row["question"], row["reply"]) for row in ROWS[:3]] + [("", "plain text")]
    for number, (prompt, answer) in enumerate(expected):
        whole, asked = tokenizer.encode_batch([prompt + answer, prompt])
        replied = whole[len(asked) :]
        assert np.array(indexed[number]).tolist() == whole + eod and whole == asked + replied
        assert mask[number].tolist() == [0] * len(asked) + [1] * (len(replied) + 1)
    stats = manifest.splits["train"]
    assert stats.target_tokens == sum(int(own.sum()) for own in mask) < stats.tokens == sum(own.size for own in mask)
    assert [entry.name for entry in manifest.skipped] == [f"{source['path']}:line 4"]
    pieces = read_document(tmp_path / "out", "train", 0)
    learned = len(tokenizer.encode_batch([" Down the road."])[0]) + 1
    assert pieces[1] == TextPiece(True, learned, " Down the road.<|endoftext|>")
    assert (pieces[0].counts, pieces[0].text) == (False, "Where is the sea?")
    assert all(wrong is None for _, wrong in check_dataset(tmp_path / "out"))
    (tmp_path / "out/train.loss_mask.bin").write_bytes(b"\x01")
    assert [what for what, wrong in check_dataset(tmp_path / "out") if wrong] == [
        "train.loss_mask.bin",
        "documents of train",
    ]


def test_token_filters_keep_masks_and_counts_in_step(tokenizer: Tokenizer, tmp_path: Path):
    source = write_rows(tmp_path, "jsonl", ROWS[:3]) | {"prompt_column": "question", "answer_column": "reply"}
    whole = prepare(rows_recipe(tokenizer, source), tmp_path / "whole", workers=1)
    lengths = load_index(tmp_path / "whole/train").lengths
    limit = int(np.sort(lengths)[1])
    some = prepare(rows_recipe(tokenizer, source, filters={"max_tokens": limit}), tmp_path / "some", workers=1)
    assert (some.splits["train"].documents, some.filtered) == (2, 1)
    kept = np.repeat(lengths <= limit, lengths)
    for name, dtype in (("train.bin", np.uint16), ("train.loss_mask.bin", np.uint8)):
        everything = np.fromfile(tmp_path / "whole" / name, dtype)
        assert np.array_equal(np.fromfile(tmp_path / "some" / name, dtype), everything[kept])
    texts = ["".join((row["question"], row["reply"])) for row, n in zip(ROWS, lengths, strict=False) if n <= limit]
    assert some.splits["train"].characters == sum(map(len, texts)) < whole.splits["train"].characters


def test_conversations_are_learned_where_the_assistant_speaks(chat_tokenizer: Path, tmp_path: Path):
    turns = [("system", "Be short."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    talk = [{"role": role, "content": text} for role, text in turns]
    rows = [
        {"talk": talk},
        {"talk": talk[:2]},
        {"talk": [*talk[:2], {"role": "assistant", "content": "<|im_end|>"}]},
        {"talk": [{"role": "assistant", "content": "Hello"}]},
    ]
    source = write_rows(tmp_path, "parquet", rows) | {"messages_column": "talk"}
    manifest = prepare(rows_recipe(chat_tokenizer, source), tmp_path / "by_turns", workers=1)
    assert [entry.reason[:20] for entry in manifest.skipped] == [
        "no turn of the assis",
        "a message holds '<|i",
        "it begins with a tur",
    ]
    pieces = read_document(tmp_path / "by_turns", "train", 0)
    assert [(piece.counts, piece.text) for piece in pieces] == [
        (False, "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "1<|im_end|>\n"),
        (False, "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "2<|im_end|>\n<|endoftext|>"),
    ]
    (chat_tokenizer / "chat_template.jinja").write_text(MARKED)
    with pytest.raises(ValueError, match=r"holds another dataset \(chat_template\)"):
        prepare(rows_recipe(chat_tokenizer, source), tmp_path / "by_turns", workers=1)
    prepare(rows_recipe(chat_tokenizer, source), tmp_path / "marked", workers=1)
    pieces = read_document(tmp_path / "marked", "train", 0)
    assert [piece.text for piece in pieces if piece.counts] == ["1<|im_end|>", "2<|im_end|>", "<|endoftext|>"]
    assert pieces[0].text == "U: Be short. U: One? A: "


def test_templates_that_cannot_serve_are_refused(chat_tokenizer: Path, tmp_path: Path):
    talk = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}] * 2
    source = write_rows(tmp_path, "jsonl", [{"talk": talk}]) | {"messages_column": "talk"}
    template = chat_tokenizer / "chat_template.jinja"
    for text, message in (
        (FORGETS, r"rows.jsonl:line 1: the chat template starts an answer differently from its own generation prompt"),
        ("{{ raise_exception('no') }}", "the chat template refuses it: no"),
        ("{% if %}", "is not valid"),
    ):
        template.write_text(text)
        with pytest.raises(ValueError, match=message):
            prepare(rows_recipe(chat_tokenizer, source), tmp_path / "out", workers=1)
    template.unlink()
    with pytest.raises(CorpusError, match="needs a chat template, and the tokenizer .* has none"):
        prepare(rows_recipe(chat_tokenizer, source), tmp_path / "out", workers=1, overwrite=True)


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ({"prompt_column": "a"}, {}, "prompt_column and answer_column go together"),
        ({"prompt_column": "a", "answer_column": "b", "messages_column": "c"}, {}, "name only one of"),
        ({"text_column": "a", "messages_column": "c"}, {}, "name only one of"),
        ({"messages_column": "c"}, {"tokenizer": {"kind": "bpe", "vocab_size": 300}}, "needs a chat template"),
        ({"kind": "files"}, {"filters": {"drop_column": "bad"}}, r"filters.drop_column needs rows, but sources.0"),
    ],
)
def test_recipes_that_contradict_themselves(source: dict, more: dict, message: str):
    plain = {"tokenizer": {"kind": "pretrained", "path": "t"}}
    with pytest.raises(ConfigError, match=message):
        recipe_from_dict({"sources": [{"kind": "jsonl", "path": "x"} | source]} | plain | more)


def test_a_loss_mask_is_written_only_for_data_that_has_one(dataset: Path, tmp_path: Path):
    assert not list(dataset.glob("*.loss_mask.bin"))
    shutil.copytree(dataset, tmp_path / "copy")
    (tmp_path / "copy/train.loss_mask.bin").write_bytes(b"\x01")
    assert "documents of train" in [what for what, wrong in check_dataset(tmp_path / "copy") if wrong]
