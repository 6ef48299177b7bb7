"""Conversations as documents: the tokenizer's chat template writes them, and the assistant's turns are learned.

A template that marks the assistant's part with `{% generation %}` defines the tokens that count. With any other
template, the conversation is rendered up to each assistant's turn, with the prompt for an answer, and once more with
that turn. The difference counts, including the end-of-turn token. Some templates change earlier turns when later ones
follow (Qwen 3 drops the thoughts of earlier answers), so such a conversation cannot be cut this way. Then each answer
becomes a document of its own, in which only that answer counts: the model learns it in the form that it generates.

Beside the messages, the text of a template may depend on three things, all part of the data's identity: a row's tools
and template arguments, the recipe's `chat.template_arguments`, and `chat.now`, the time that a template reads as the
clock. The clock of the machine is never read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from tokenizers import Tokenizer

from moba_megatron.corpus.chat_options import Chat
from moba_megatron.corpus.documents import CorpusError, Document, Segment, Skipped, make_segmented, text_hash
from moba_megatron.corpus.messages import (
    NO_MESSAGES,
    arguments_of,
    is_text,
    joined_text,
    message_list,
    texts_in,
    tool_list,
)
from moba_megatron.corpus.tokenizer import template_files

NO_TOOLS_WRITTEN = "rows have tools, but the chat template does not use them"
_TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json")
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANY_MARK = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_NO_CLOCK = "asks for the time of day"
_NO_FORMAT = "computes the format in which it asks for the time of day"
# What `sharegpt` sets call roles.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
_PROBES = {role: f"a probe of what the {role} says" for role in ("system", "user", "assistant")}
_PROBED = (("user",), ("user", "assistant"), ("system", "user"), ("system", "user", "assistant"))
_OWN_NAMES = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "namespace", "dict"}


class ChatTemplate:
    """The chat template of a tokenizer folder.

    Args:
        folder: a Hugging Face tokenizer folder.
        chat: arguments for the template, and the time that it may ask for.

    Raises:
        CorpusError: the folder has no chat template, or one that `chat` does not fit.
    """

    def __init__(self, folder: Path, chat: Chat):
        # As `tokenizer.json` says, whatever class transformers would build of it: so are the ids.
        from transformers import PreTrainedTokenizerFast

        self.folder, self.chat = folder, chat
        try:
            self.tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(folder))
        except (ValueError, TypeError) as error:
            raise CorpusError(f"the tokenizer in {folder} cannot be loaded by transformers: {error}") from error
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
        added = self.tokenizer.added_tokens_decoder.values()
        self.not_ours = [token.content for token in added if own.token_to_id(token.content) is None]
        """Tokens of tokenizer_config.json that tokenizer.json does not have."""
        self.normalize = (lambda text: text) if own.normalizer is None else own.normalizer.normalize_str
        if not self.tokenizer.chat_template:
            raise CorpusError(
                f"messages_column needs a chat template, and the tokenizer in {folder} has none: add a "
                "chat_template.jinja to the folder that tokenizer.path names"
            )
        self.special = [token.content for token in added if token.special]
        self._texts = {tools: self._with_clock(self._template(tools)) for tools in (False, True)}
        trees = [self._parse(text) for text in self._texts.values()]
        read = {node.name for tree in trees for node in tree.find_all(nodes.Name) if node.ctx == "load"}
        self._check_arguments(trees, read)
        self.writes_tools = "tools" in read
        self.takes_text, self.takes_parts = self._probe()
        """Of each role, whether the template writes its content as a text, and whether alike in parts."""

    def documents(
        self, messages: Any, number: int, tools: Any = None, arguments: Any = None
    ) -> list[Document | Skipped]:
        """The documents of one conversation: mostly one.

        Args:
            messages: a list of messages with `role` and `content`, or with `from` and `value`.
            number: of its row.
            tools: of the row: a list of JSON schemas, or that list as JSON. None: it has none.
            arguments: of the row, for the template: a mapping, or one as JSON. They win over those of the recipe.

        Raises:
            CorpusError: the template asks for the time of day, and `chat.now` is not set.
        """
        try:
            turns = [self._message(message) for message in message_list(messages)]
            tools, arguments = tool_list(tools), arguments_of(arguments)
            self._refuse_special([turns, tools, arguments])
            if not any(turn["role"] == "assistant" for turn in turns):
                raise ValueError("no turn of the assistant")
            conversations = self._segments(turns, tools, arguments)
        except (TemplateError, TypeError, ValueError) as error:
            if isinstance(error, CorpusError):
                raise
            self._refuse_clock(error)
            why = f"the chat template refuses it: {error}" if isinstance(error, TemplateError) else str(error)
            return [Skipped(number, why)]
        notes = (NO_TOOLS_WRITTEN,) if tools and not self.writes_tools else ()
        self._check_tokens(conversations)
        digest = None
        if len(conversations) > 1:
            whole = json.dumps([turns, tools, arguments], sort_keys=True, default=str)
            digest = text_hash(whole.encode(errors="replace"))
        made = [make_segmented(s, number, kind="chat", row_digest=digest, notes=notes) for s in conversations]
        return made if len(made) == 1 else [item for item in made if isinstance(item, Document)] or made[:1]

    @staticmethod
    def fingerprint(folder: str | Path) -> str:
        """Hash (32 hex digits) of all settings of a tokenizer folder that decide how conversations are written."""
        digest = hashlib.blake2b(digest_size=16)
        for name in _TEMPLATE_FILES:
            path = Path(folder) / name
            digest.update(path.read_bytes() if path.is_file() else b"none")
        for path in template_files(Path(folder)):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def _template(self, tools: bool) -> str:
        """Its text; some tokenizers have another one for conversations with tools."""
        try:
            return self.tokenizer.get_chat_template(tools=[{}] if tools else None)
        except ValueError as error:
            raise CorpusError(f"the tokenizer in {self.folder}: {error}") from error

    def _with_clock(self, template: str) -> str:
        """The template with `strftime_now` as a macro that knows `chat.now`, or that refuses.

        A macro, because transformers hands nothing to a template that can be called. The line break belongs to the
        macro's block and is not written.
        """
        if "strftime_now" not in template:
            return template
        body = f"raise_exception('{_NO_CLOCK}')"
        if self.chat.now is not None:
            now = datetime.fromisoformat(self.chat.now)
            texts = {node.value for node in self._parse(template).find_all(nodes.Const) if isinstance(node.value, str)}
            clock = {text: now.strftime(text) for text in sorted(texts) if "%" in text}
            body = f"{clock!r}[format] if format in {list(clock)!r} else raise_exception('{_NO_FORMAT}')"
        return "{% macro strftime_now(format) %}{{ " + body + " }}{% endmacro %}\n" + template

    def _parse(self, template: str) -> nodes.Template:
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        try:
            return environment.parse(_ANY_MARK.sub("", template))
        except TemplateError as error:
            raise CorpusError(f"the chat template in {self.folder} is not valid: {error}") from error

    def _check_arguments(self, trees: list[nodes.Template], read: set[str]) -> None:
        """Refuse arguments that are not among the names that the template reads."""
        unknown = [name for name in self.chat.template_arguments if name not in read]
        if unknown:
            own = set.union(*(meta.find_undeclared_variables(tree) for tree in trees))
            own = sorted(own - set(self.tokenizer.special_tokens_map) - _OWN_NAMES)
            raise CorpusError(
                f"chat.template_arguments: the chat template in {self.folder} does not read {', '.join(unknown)}; it "
                f"reads {', '.join(own) or 'none'}"
            )

    def _refuse_clock(self, error: Exception) -> None:
        """Raise where the template asked for what it does not get."""
        if _NO_FORMAT in str(error):
            raise CorpusError(
                f"the chat template in {self.folder} {_NO_FORMAT}, which chat.now cannot serve: give its date by "
                f"chat.template_arguments, or write the format into the template"
            ) from error
        if _NO_CLOCK in str(error):
            raise CorpusError(self._no_clock()) from error

    def _no_clock(self) -> str:
        return (
            f"the chat template in {self.folder} {_NO_CLOCK} (strftime_now), which would make the data depend on the "
            "day they are prepared: set chat.now: 2024-07-26, or give the template its date by "
            "chat.template_arguments, such as {date_string: 26 Jul 2024}"
        )

    def _probe(self) -> tuple[dict[str, bool], dict[str, bool]]:
        """(by role, whether content that is a text is written; whether content in parts is written, and alike)."""
        texts: dict[str, bool] = {}
        parts: dict[str, bool] = {}
        for roles in _PROBED:
            whole = self._written(roles, ())
            for role in roles:
                if role in texts:
                    continue
                if whole is not None and _PROBES[role] in whole:
                    texts[role], parts[role] = True, self._written(roles, (role,)) == whole
                elif _PROBES[role] in (self._written(roles, roles) or ""):
                    texts[role], parts[role] = False, True
        return texts, parts

    def _written(self, roles: tuple[str, ...], in_parts: tuple[str, ...]) -> str | None:
        """A conversation of these roles, some of them with content in parts; None where the template refuses it."""
        contents = {
            role: [{"type": "text", "text": _PROBES[role]}] if role in in_parts else _PROBES[role] for role in roles
        }
        try:
            return self._render([{"role": role, "content": contents[role]} for role in roles], None, {}, False)
        except (TemplateError, TypeError, ValueError) as error:
            self._refuse_clock(error)
            return None

    def _render(self, messages: list[dict], tools: list | None, arguments: dict[str, Any], prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            chat_template=self._texts[bool(tools)],
            tokenize=False,
            add_generation_prompt=prompt,
            **{**self.chat.template_arguments, **arguments},
        )

    def _message(self, message: Any) -> dict[str, Any]:
        """A message in the form that the template takes.

        Raises:
            ValueError: it is none.
        """
        if isinstance(message, dict) and {"from", "value"} <= message.keys() and "role" not in message:
            kept = {key: value for key, value in message.items() if key not in ("from", "value")}
            who = str(message["from"])
            message = {"role": _ROLES.get(who.lower(), who), "content": message["value"], **kept}
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(NO_MESSAGES)
        # Tables give every message all keys that one of them has.
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        if isinstance(content, list):
            as_it_is = self.takes_parts.get(message["role"]) and is_text(content)
            message["content"] = content if as_it_is else joined_text(content)
        elif content is not None and not isinstance(content, str):
            raise ValueError(f"content is {type(content).__name__}, not a text")
        if isinstance(message.get("content"), str) and not self.takes_text.get(message["role"], True):
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message

    def _refuse_special(self, values: Any) -> None:
        """No text of a row may become a special token, wherever the template writes it."""
        for text in texts_in(values):
            normalized = self.normalize(text)
            found = next((token for token in self.special if token in text or token in normalized), None)
            if found is not None:
                raise ValueError(f"a message holds {found!r}, which the tokenizer reads as a special token")

    def _check_tokens(self, conversations: list[list[Segment]]) -> None:
        if not self.not_ours:
            return
        text = "".join(text for segments in conversations for text, _ in segments)
        for token in self.not_ours:
            if token in text:
                raise CorpusError(
                    f"the chat template in {self.folder} writes {token!r}, which is in tokenizer_config.json but not "
                    f"in tokenizer.json, so it would be encoded letter by letter: load the folder by "
                    "transformers.AutoTokenizer and save it again"
                )

    def _segments(self, turns: list[dict], tools: list | None, arguments: dict[str, Any]) -> list[list[Segment]]:
        """Of each document its segments."""
        if _MARK.search(self._texts[bool(tools)]):
            return [self._marked(turns, tools, arguments)]
        answers = list(self._answers(turns, tools, arguments))
        if not answers:
            raise ValueError("it begins with a turn of the assistant, which has no prompt")
        segments: list[Segment] = []
        done = ""
        for asked, answered in answers:
            if not asked.startswith(done):
                break
            segments += [(asked[len(done) :], False), (answered[len(asked) :], True)]
            done = answered
        else:
            whole = self._render(turns, tools, arguments, False)
            if whole.startswith(done):
                return [[*segments, (whole[len(done) :], False)]]
        return [[(asked, False), (answered[len(asked) :], True)] for asked, answered in answers]

    def _answers(self, turns: list[dict], tools: list | None, arguments: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """(conversation up to the prompt for an answer, the same with the answer) of each turn of the assistant that
        something comes before."""
        for place, turn in enumerate(turns):
            if turn["role"] != "assistant" or not place:
                continue
            asked = self._render(turns[:place], tools, arguments, True)
            answered = self._render(turns[: place + 1], tools, arguments, False)
            if not answered.startswith(asked):
                raise ValueError(
                    "the chat template starts an answer differently from its own generation prompt: mark the tokens "
                    "that count with "
                    "{% generation %}"
                )
            yield asked, answered

    def _marked(self, turns: list[dict], tools: list | None, arguments: dict[str, Any]) -> list[Segment]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            conversations=[turns],
            tools=tools or None,
            chat_template=self._texts[bool(tools)],
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.chat.template_arguments, **arguments},
        )
        text, done, segments = rendered[0], 0, []
        for start, stop in spans[0]:
            segments += [(text[done:start], False), (text[start:stop], True)]
            done = stop
        return [*segments, (text[done:], False)]
