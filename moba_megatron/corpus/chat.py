"""Conversations as documents: the tokenizer's chat template, with the assistant's turns as what is learned.

A template that marks the assistant's part with `{% generation %}` says itself what counts. Of any other the
conversation is rendered up to each assistant's turn, with the prompt for an answer, and once more with that turn: what
is new counts, the end-of-turn token included. A template that writes earlier turns otherwise once later ones follow
cannot be cut this way; such conversations are listed as skipped.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from moba_megatron.corpus.documents import CorpusError, Document, Segment, Skipped, make_segmented

_NOT_BY_TURNS = "it does not write a conversation turn by turn; mark what counts with {% generation %}"
_TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json")
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """The chat template of a tokenizer folder.

    Args:
        folder: a Hugging Face tokenizer folder.
        end_of_document: the token that ends documents, which the template must not write.

    Raises:
        CorpusError: the folder has no chat template.
    """

    def __init__(self, folder: Path, end_of_document: str):
        from transformers import AutoTokenizer

        self.folder, self.end_of_document = folder, end_of_document
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        if not self.tokenizer.chat_template:
            raise CorpusError(
                f"messages_column needs a chat template, and the tokenizer in {folder} has none: add a "
                "chat_template.jinja to the folder that tokenizer.path names"
            )
        self.marked = bool(_MARK.search(self.tokenizer.get_chat_template()))
        added = self.tokenizer.added_tokens_decoder.values()
        self.special = [token.content for token in added if token.special]

    def document(self, messages: Any, number: int) -> Document | Skipped:
        """The document of one conversation.

        Raises:
            CorpusError: the template writes the end-of-document token.
        """
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            return Skipped(number, "not a list of messages with role and content")
        # Tables give every message all keys that one of them has.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        for message in messages:
            found = next((token for token in self.special if token in str(message.get("content", ""))), None)
            if found is not None:
                return Skipped(number, f"a message holds {found!r}, which the tokenizer reads as a special token")
        if not any(message.get("role") == "assistant" for message in messages):
            return Skipped(number, "no turn of the assistant")
        try:
            segments = self._marked(messages) if self.marked else self._by_turns(messages)
        except (TemplateError, TypeError, ValueError) as error:
            return Skipped(number, f"the chat template refuses it: {error}")
        if any(self.end_of_document in text for text, _ in segments):
            raise CorpusError(
                f"the chat template in {self.folder} writes {self.end_of_document!r}, the end-of-document token, in a "
                "conversation: name another token with tokenizer.end_of_document"
            )
        return make_segmented(segments, number)

    @staticmethod
    def fingerprint(folder: str | Path) -> str:
        """Hash (32 hex digits) of what decides how conversations of a tokenizer folder are written."""
        digest = hashlib.blake2b(digest_size=16)
        for name in _TEMPLATE_FILES:
            path = Path(folder) / name
            digest.update(path.read_bytes() if path.is_file() else b"none")
        return digest.hexdigest()

    def _render(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _by_turns(self, messages: list[dict[str, Any]]) -> list[Segment]:
        if messages[0].get("role") == "assistant":
            raise ValueError("it begins with the assistant, and nothing asks for that turn")
        segments: list[Segment] = []
        done = ""
        for turn, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            asked, answered = self._render(messages[:turn], True), self._render(messages[: turn + 1], False)
            if not (answered.startswith(asked) and asked.startswith(done)):
                raise ValueError(
                    "it does not write a conversation turn by turn; mark what counts with {% generation %}"
                )
            segments += [(asked[len(done) :], False), (answered[len(asked) :], True)]
            done = answered
        whole = self._render(messages, False)
        if not whole.startswith(done):
            raise ValueError(_NOT_BY_TURNS)
        return [*segments, (whole[len(done) :], False)]

    def _marked(self, messages: list[dict[str, Any]]) -> list[Segment]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        text, done, segments = rendered[0], 0, []
        for start, stop in spans[0]:
            segments += [(text[done:start], False), (text[start:stop], True)]
            done = stop
        return [*segments, (text[done:], False)]
