"""Conversations: the ids of `apply_chat_template`, the turns that are learned, what rows and templates may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_engines import KINDS, folder_of
from test_prepare_rows import CHATML, MARKED, chat_tokenizer, rows_recipe, write_rows
from transformers import PreTrainedTokenizerFast

from moba_megatron.config import ConfigError
from moba_megatron.corpus.chat import NO_TOOLS_WRITTEN, ChatTemplate
from moba_megatron.corpus.chat_options import Chat
from moba_megatron.corpus.documents import CorpusError, Document, Skipped
from moba_megatron.corpus.engines import PROMPT_RUNS_ON, Encoder
from moba_megatron.corpus.indexed import load_index
from moba_megatron.corpus.inspect import check_dataset, read_document
from moba_megatron.corpus.prepare import prepare
from moba_megatron.corpus.recipe import recipe_from_dict
from moba_megatron.corpus.tokenizer import Tokenizer

__all__ = ["chat_tokenizer"]

INST = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "  Today: {{ date_string }}\n{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen 3: earlier answers lose their thoughts, the last one gets an empty thought.
THINKS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "\n{%- if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function | tojson }}</call>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ONLY_PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "inst": INST,
    "dated": DATED,
    "thinks": THINKS,
    "tools": TOOLS,
    "parts": ONLY_PARTS,
    "marked": MARKED,
}


def turns(*texts: str) -> list[dict[str, Any]]:
    """A conversation that the user begins."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


CONVERSATIONS = [
    turns("good day", "none fine"),
    turns("what is it?\n", "  Paris", "and é?", "def f(x):\n    return x\n"),
]


def folder_with(template: str, folder: Path, kind: str = "byte_level") -> Path:
    folder_of(KINDS[kind](), folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def learned(document: Document) -> list[str]:
    return [text for text, counts in document.segments if counts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_are_those_of_apply_chat_template(tmp_path: Path, kind: str, name: str):
    folder = folder_with(TEMPLATES[name], tmp_path / kind, kind)
    template = ChatTemplate(folder, Chat(now="2024-07-26"))
    own, theirs = Tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(str(folder))
    clock = {"date_string": "26 Jul 2024"} if name == "dated" else {}
    for conversation in CONVERSATIONS:
        made = template.documents(conversation, 0)
        answers = [turn["content"] for turn in conversation if turn["role"] == "assistant"]
        # A template that rewrites earlier turns gives a document for each answer.
        several = name == "thinks" and len(answers) > 1
        assert len(made) == (len(answers) if several else 1)
        encoded = Encoder(own, "tokenizers").encode(made)
        edges = np.cumsum(encoded.lengths)[:-1]
        for n, (row, counts) in enumerate(
            zip(np.split(encoded.ids, edges), np.split(encoded.counts, edges), strict=True)
        ):
            part = conversation[: 2 * n + 2] if several else conversation
            if name == "parts":
                part = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in part]
            expected = theirs.apply_chat_template(part, tokenize=True, return_dict=False, **clock)
            # Training puts an end of its own behind each document.
            assert row.tolist() == (expected[:-1] if expected[-1] == own.eod_id else expected)
            text = own.decode(row[counts]).replace(" ", "")
            shown = answers[n : n + 1] if several else answers
            # A token may cover the end of what asks and the first letters of the answer.
            assert all(
                answer.strip().replace(" ", "")[PROMPT_RUNS_ON in encoded.notes and 3 :] in text for answer in shown
            )
            assert not any(turn["content"].strip() in text for turn in conversation if turn["role"] == "user")


def test_answers_of_a_template_that_rewrites_turns_go_to_one_split(chat_tokenizer: Path, tmp_path: Path):
    (chat_tokenizer / "chat_template.jinja").write_text(THINKS)
    rows = [{"talk": turns(f"ask {n}", f"<think>hm</think>first {n}", "more", f"second {n}")} for n in range(60)]
    source = write_rows(tmp_path, "jsonl", rows) | {"messages_column": "talk"}
    manifest = prepare(rows_recipe(chat_tokenizer, source, split={"validation": 0.4}), tmp_path / "out", workers=1)
    assert sum(split.documents for split in manifest.splits.values()) == 120 and manifest.skipped_total == 0
    numbers = {}
    for name, split in manifest.splits.items():
        pieces = [read_document(tmp_path / "out", name, n) for n in range(split.documents)]
        assert all([piece.counts for piece in own] == [False, True] for own in pieces)
        numbers[name] = {own[1].text.split("<|im_end|>")[0].split()[-1] for own in pieces}
        assert len(numbers[name]) * 2 == split.documents
    assert not numbers["train"] & numbers["validation"]
    text = read_document(tmp_path / "out", "train", 1)
    # The first answer is learned with the thought that generation gives it, and shown without one later.
    assert "hm" not in text[0].text + text[1].text and text[1].text.startswith("<think>\n\n</think>\n\nsecond")


def test_tools_and_arguments_reach_the_template_without_the_nulls_of_tables(tmp_path: Path):
    folder = folder_with(TOOLS, tmp_path / "tok")
    rows = []
    for n in range(4):
        name, arguments = ("get_weather", {"city": "Paris"}) if n % 2 else ("search", {"query": {"text": "news"}})
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages = [*turns("hello"), {"role": "assistant", "content": None, "tool_calls": [call]}]
        messages += [{"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "Done."}]
        tools = [{"type": "function", "function": {"name": name, "parameters": {"properties": arguments}}}]
        rows.append({"messages": messages, "tools": tools, "given": json.dumps(tools)})
    texts = {}
    for kind in ("jsonl", "parquet", "arrow", "datasets"):
        source = write_rows(tmp_path, kind, rows) | {"messages_column": "messages"}
        for column in (None, "given"):
            out = tmp_path / f"{kind}_{column}"
            prepare(rows_recipe(folder, source | {"tools_column": column}), out, workers=1)
            texts[kind, column] = [[p.text for p in read_document(out, "train", n)] for n in range(4)]
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    for own in texts.values():
        for n, pieces in enumerate(own):
            given = rows[n]
            whole = theirs.apply_chat_template(given["messages"], tools=given["tools"], tokenize=False)
            assert "".join(pieces) == whole + "</s>"
    assert '<call>{"name": "search", "arguments": {"query": {"text": "news"}}}</call>' in texts["parquet", None][0][1]
    # A template that writes no tools is told of.
    (folder / "chat_template.jinja").write_text(CHATML)
    source = write_rows(tmp_path, "jsonl", rows) | {"messages_column": "messages"}
    assert prepare(rows_recipe(folder, source), tmp_path / "untold", workers=1).notes == {NO_TOOLS_WRITTEN: 4}


def test_rows_may_hold_arguments_and_other_forms_of_messages(tmp_path: Path):
    folder = folder_with("{{ mood }}|" + CHATML, tmp_path / "tok")
    template = ChatTemplate(folder, Chat(template_arguments={"mood": "calm"}))

    def text(messages: Any, **row: Any) -> str:
        (item,) = template.documents(messages, 0, **row)
        assert isinstance(item, Document), item
        return item.text

    plain = text(turns("hi", "yes"))
    assert plain.startswith("calm|<|im_start|>user\nhi")
    assert text(turns("hi", "yes"), arguments={"mood": "gay"}) == plain.replace("calm", "gay")
    assert text(json.dumps(turns("hi", "yes")), arguments='{"mood": null}').startswith("None|")
    assert text([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]) == plain
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert "user\na\nb<|im_end|>" in text([*parts, *turns("x", "yes")[1:]])
    assert text(turns("hi", "yes"), tools="", arguments=" ") == plain
    assert text([json.dumps(turn) for turn in turns("hi", "yes")]) == plain
    assert text([{"from": "Human", "value": "hi"}, {"from": "GPT", "value": "yes"}]) == plain
    # A first turn of the assistant is context.
    (item,) = template.documents([{"role": "assistant", "content": "Hello"}, *turns("hi", "yes")], 0)
    assert learned(item) == ["yes<|im_end|>\n"] and "Hello" in item.text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": "hello"}, "not JSON"),
        ({"messages": {"role": "user"}}, "not a list of messages"),
        ({"messages": None}, "not a list of messages"),
        ({"messages": [{"content": "a"}]}, "not a list of messages with role and content"),
        ({"messages": turns("only a question")}, "no turn of the assistant"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "a turn of the assistant, which has no prompt"),
        ({"messages": turns("a", "<|im_end|>")}, "holds '<|im_end|>'"),
        ({"messages": [*turns("a", "b"), {"role": "</s>", "content": "c"}]}, "holds '</s>'"),
        ({"messages": [{**turns("a")[0], "reasoning": {"deep": ["<s>"]}}, *turns("", "b")[1:]]}, "holds '<s>'"),
        ({"messages": turns("a", "b"), "tools": [{"<s>": 1}]}, "holds '<s>'"),
        ({"messages": turns("a", "b"), "tools": "nothing"}, "not JSON"),
        ({"messages": turns("a", "b"), "tools": "3"}, "tools is int, not a list"),
        ({"messages": turns("a", "b"), "arguments": {"tokenize": True}}, "names tokenize, which `prepare` passes"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "text": "cap"}]}, *turns("", "b")[1:]]}, "image"),
        ({"messages": turns("a", "b"), "arguments": [1]}, "chat_template_kwargs is list, not a mapping"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, *turns("", "b")[1:]]}, "of type image"),
        ({"messages": [{"role": "user", "content": 3}, *turns("", "b")[1:]]}, "content is int, not a text"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_listed(tmp_path: Path, row: dict[str, Any], reason: str):
    template = ChatTemplate(folder_with(CHATML, tmp_path / "tok"), Chat())
    (item,) = template.documents(row["messages"], 7, row.get("tools"), row.get("arguments"))
    assert isinstance(item, Skipped) and item.number == 7 and reason in item.reason


def test_the_clock_is_part_of_the_data(chat_tokenizer: Path, tmp_path: Path):
    (chat_tokenizer / "chat_template.jinja").write_text(DATED)
    source = write_rows(tmp_path, "jsonl", [{"talk": turns("hi", "yes")}]) | {"messages_column": "talk"}

    def first_line(out: str, **chat: Any) -> str:
        prepare(rows_recipe(chat_tokenizer, source, chat=chat), tmp_path / out, workers=1)
        return read_document(tmp_path / out, "train", 0)[0].text.splitlines()[0]

    with pytest.raises(
        CorpusError, match=r"asks for the time of day \(strftime_now\), .*: set chat.now: 2024-07-26, or"
    ):
        first_line("none")
    assert not list(tmp_path.glob("none*"))
    assert first_line("now", now="2024-07-26") == "  Today: 26 Jul 2024"
    assert first_line("given", template_arguments={"date_string": "a day"}) == "  Today: a day"
    with pytest.raises(ValueError, match=r"holds another dataset \(recipe.chat.now\)"):
        first_line("now", now="2024-07-27")
    # A format that only the running template knows.
    (chat_tokenizer / "chat_template.jinja").write_text("{{ strftime_now('%' ~ 'd') }}" + CHATML)
    with pytest.raises(
        CorpusError, match="computes the format in which it asks for the time of day, which chat.now cannot serve"
    ):
        first_line("other", now="2024-07-26")


def test_chat_settings_that_have_no_effect_are_refused(chat_tokenizer: Path, tmp_path: Path):
    source = write_rows(tmp_path, "jsonl", [{"talk": turns("hi", "yes"), "text": "a"}])
    chat = source | {"messages_column": "talk"}
    with pytest.raises(CorpusError, match="does not read enable_thinkin; it reads none"):
        prepare(
            rows_recipe(chat_tokenizer, chat, chat={"template_arguments": {"enable_thinkin": True}}), tmp_path / "o"
        )
    with pytest.raises(ConfigError, match="chat has no effect: no source has a messages_column"):
        rows_recipe(chat_tokenizer, source, chat={"now": "2024-07-26"})
    for wrong, message in (
        ({"now": "noon"}, "chat.now"),
        ({"template_arguments": {"tools": []}}, "tools cannot be set"),
    ):
        with pytest.raises(ConfigError, match=message):
            rows_recipe(chat_tokenizer, chat, chat=wrong)
    with pytest.raises(ConfigError, match="tools_column belongs to messages_column"):
        recipe_from_dict({"sources": [source | {"tools_column": "t"}], "tokenizer": {"kind": "bpe", "vocab_size": 300}})


def test_a_template_may_end_turns_as_documents_end(tmp_path: Path):
    """As Llama 3's and Mistral's do: one end at the end of a conversation, and none of its turns ends the document."""
    folder = folder_with(INST, tmp_path / "tok", "prepend")
    source = write_rows(tmp_path, "jsonl", [{"talk": talk} for talk in CONVERSATIONS]) | {"messages_column": "talk"}
    manifest = prepare(rows_recipe(folder, source), tmp_path / "out", workers=1)
    assert manifest.splits["train"].documents == 2 and not manifest.skipped_total
    ids = np.fromfile(tmp_path / "out/train.bin", np.uint16)
    lengths = load_index(tmp_path / "out/train").lengths
    eod = Tokenizer(folder).eod_id
    ends = [np.count_nonzero(row == eod) for row in np.split(ids, np.cumsum(lengths)[:-1])]
    assert ends == [1, 2]
    assert all(wrong is None for _, wrong in check_dataset(tmp_path / "out"))


def test_the_end_of_a_turn_that_is_not_learned_is_not_learned(tmp_path: Path):
    ends = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    folder = folder_with(ends, tmp_path / "tok")
    talk = turns("ask", "answer", "thanks")
    source = write_rows(tmp_path, "jsonl", [{"talk": talk}, {"talk": talk[:2]}]) | {"messages_column": "talk"}
    prepare(rows_recipe(folder, source), tmp_path / "out", workers=1)
    pieces = [[(p.counts, p.text) for p in read_document(tmp_path / "out", "train", n)] for n in (0, 1)]
    assert pieces == [
        [(False, "user: ask</s>assistant:"), (True, " answer</s>"), (False, "user: thanks</s>")],
        [(False, "user: ask</s>assistant:"), (True, " answer</s>")],
    ]


def test_templates_for_tools_go_along(tmp_path: Path):
    folder = folder_with(CHATML, tmp_path / "tok")
    (folder / "additional_chat_templates").mkdir()
    other = folder / "additional_chat_templates/tool_use.jinja"
    other.write_text(TOOLS)
    row = {"talk": turns("hi", "yes"), "tools": [{"type": "function", "function": {"name": "f"}}]}
    source = write_rows(tmp_path, "jsonl", [row, {"talk": turns("hi", "yes")}]) | {"messages_column": "talk"}
    manifest = prepare(rows_recipe(folder, source), tmp_path / "out", workers=1)
    assert not manifest.notes
    texts = ["".join(p.text for p in read_document(tmp_path / "out", "train", n)) for n in (0, 1)]
    assert '"name": "f"' in texts[0] and texts[0].endswith("[assistant]yes</s>") and "<|im_start|>user" in texts[1]
    other.write_text(TOOLS + " ")
    with pytest.raises(ValueError, match=r"holds another dataset \(chat_template\)"):
        prepare(rows_recipe(folder, source), tmp_path / "out", workers=1)


def test_values_that_tables_keep_as_json_are_values(tmp_path: Path):
    """`datasets` does so where rows differ in shape; the ids are those of the same rows as JSON Lines."""
    import datasets

    folder = folder_with(TOOLS, tmp_path / "tok")
    rows = []
    for n in range(4):
        call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1} if n % 2 else {"b": ["x"]}}}
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": {}} if n % 2 else {"b": {"c": 1}}}}]
        talk = [*turns(f"ask {n}"), {"role": "assistant", "content": "so", "tool_calls": [call]}]
        rows.append({"talk": talk, "tools": tools})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=tmp_path / "c"
    )
    assert "Json" in str(read.features)
    read.to_parquet(tmp_path / "rows.parquet")
    read.save_to_disk(tmp_path / "saved")
    texts = []
    for source in (
        {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")},
        {"kind": "parquet", "path": str(tmp_path / "rows.parquet")},
        {"kind": "datasets", "path": str(tmp_path / "saved")},
    ):
        out = tmp_path / source["kind"]
        prepare(rows_recipe(folder, source | {"messages_column": "talk"}), out, workers=1)
        texts.append([[p.text for p in read_document(out, "train", n)] for n in range(4)])
    assert texts[0] == texts[1] == texts[2] and '"arguments": {"b": ["x"]}' in texts[0][0][1]


def test_content_in_parts_by_role_and_context(tmp_path: Path):
    needs_system = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + ONLY_PARTS
    by_role = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'user' and m.content is not string %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% else %}{{ m.content }}{% endif %};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    talk = [{"role": "system", "content": "be"}, *turns("one", "two")]
    in_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in talk]
    for number, template in enumerate((needs_system, by_role)):
        made = ChatTemplate(folder_with(template, tmp_path / f"{number}"), Chat())
        texts = [made.documents(messages, 0)[0].text for messages in (talk, in_parts)]
        assert texts[0] == texts[1] and all(word in texts[0] for word in ("be", "one", "two")) and "{" not in texts[0]


def test_tokens_that_the_tokenizer_file_lacks_are_refused(tmp_path: Path):
    folder = folder_with("{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}{% endfor %}", tmp_path / "tok")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"extra_special_tokens": {"turn": "<|turn|>"}}))
    with pytest.raises(
        CorpusError, match=r"writes '<\|turn\|>', which is in tokenizer_config.json but not in tokenizer.json"
    ):
        ChatTemplate(folder, Chat()).documents(turns("a", "b"), 0)


def test_special_tokens_that_a_normalizer_makes_are_seen(tmp_path: Path):
    from tokenizers import normalizers

    folder = folder_with(CHATML, tmp_path / "tok")
    backend = Tokenizer(folder).backend
    backend.normalizer = normalizers.NFKC()
    backend.save(str(folder / "tokenizer.json"))
    (item,) = ChatTemplate(folder, Chat()).documents(turns("a", "\uff1c/s\uff1e"), 0)
    assert isinstance(item, Skipped) and "holds '</s>'" in item.reason


def test_a_beginning_for_conversations_alone_is_refused(chat_tokenizer: Path, tmp_path: Path):
    source = write_rows(tmp_path, "jsonl", [{"talk": turns("hi", "yes")}]) | {"messages_column": "talk"}
    spec = {"kind": "pretrained", "path": str(chat_tokenizer), "begin_of_document": "<|im_start|>"}
    with pytest.raises(ConfigError, match="begin_of_document = '<|im_start|>' has no effect: conversations begin"):
        recipe_from_dict({"sources": [source], "tokenizer": spec})


def test_dates_in_messages_do_not_stop_a_rewriting_template(tmp_path: Path):
    import datetime

    template = ChatTemplate(folder_with(THINKS, tmp_path / "tok"), Chat())
    talk = [{**turn, "timestamp": datetime.datetime(2024, 1, 1)} for turn in turns("a", "b", "c", "d")]
    assert [type(item) for item in template.documents(talk, 0)] == [Document, Document]
