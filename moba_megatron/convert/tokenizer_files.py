"""The tokenizer of a converted model: its files, its special ids, and whether transformers reads it correctly.

`AutoTokenizer` of transformers 5 uses `model_type` if `tokenizer_class` is missing, and for Qwen 2 always: it builds
that family's own tokenizer around the vocabulary, which cuts text in another way and silently gives other ids. So the
class is always written, and ids are compared on texts that such tokenizers cut differently: the rules differ in spaces,
digits, line ends and letters, and in what follows a special token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moba_megatron.config import ConfigError
from moba_megatron.corpus.tokenizer import TOKENIZER_FILES, Tokenizer, copy_files

CONFIG = "tokenizer_config.json"
# Beside what a dataset keeps: the forms of families that transformers reads without tokenizer.json.
FILES = (*TOKENIZER_FILES, "tokenizer.model", "vocab.json", "merges.txt")
TEXT = """Everyone has the right to freedom of opinion and expression; this right includes freedom to hold opinions
without interference and to seek, receive and impart information and ideas through any media.

\tw12 = 34567  # 東京
"""
_TEXTS = (
    TEXT,
    " one leading space",
    "   three leading spaces",
    "a  b   c    d\t\te \t f  ",
    "0 1 00 11 000 111 0000 1111 2222 12345 3.14159 1,000,000 2024-01-31 7x7 x99 ٣٤ ² ½",
    "\n\n\nlines\n\n\n\nof \n \n  all\r\n\r\nkinds\n",
    "I'LL we've DON'T it’s O'Neill's 'quoted' “so” … (a)[b]{c}; x!=y?--z++",
    "def f(x):\n    return x**2  # two\n\n\n\tif x:\n\t\tpass",
    "naïve Café É ﬁ ① ａｂ \u00a0no\u200bbreak Привет ПРИВЕТ שלום مرحبا हिन्दी ไทย 東京タワー 한국어",
    "👩\u200d👩\u200d👧 🇯🇵 e\u0301 \ufffd ∑x² → 50% £9",
)
_AFTER_SPECIAL = ("{0}word {0} word{0}  word{0}\nword{0}1 {0}{0}\n\n{0}.", "word{0} word {0}\n")
_SPECIAL_TOKENS = 8


def copy_tokenizer_files(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, and the generation settings beside it."""
    copy_files(source, folder, FILES)


def complete_tokenizer_config(folder: Path, eos_token: str) -> None:
    """Write the settings that transformers needs and the folder lacks: the class that reads any `tokenizer.json`, and
    the token that ends a text."""
    values = _read(folder / CONFIG)
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos_token}
    if "eos_token" in _read(folder / "special_tokens_map.json"):
        del defaults["eos_token"]
    if defaults.keys() - values.keys():
        text = json.dumps({**defaults, **values}, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """`eos_token_id`, the token that ended documents in training, and `bos_token_id` and `pad_token_id` where the
    tokenizer has them."""
    ids = {"eos_token_id": tokenizer.eod_id}
    given = _read(tokenizer.folder / CONFIG)
    for kind in ("bos", "pad"):
        token = given.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.backend.token_to_id(token) if token else None
        if number is not None:
            ids[f"{kind}_token_id"] = number
    return ids


def tokenizer_class(folder: Path, tokenizer: Tokenizer) -> str:
    """The class of transformers that gives this tokenizer's ids: `AutoTokenizer`, or `PreTrainedTokenizerFast` where
    the automatic choice is wrong.

    Raises:
        ConfigError: neither does, with a text that they read otherwise.
    """
    import transformers

    texts = compared_texts(tokenizer)
    wanted = tokenizer.encode_batch(texts)
    differing = {}
    for name in ("AutoTokenizer", "PreTrainedTokenizerFast"):
        reader = getattr(transformers, name).from_pretrained(folder)
        given = (reader(text, add_special_tokens=False).input_ids for text in texts)
        other = next((text for text, ids, ours in zip(texts, given, wanted, strict=True) if ids != ours), None)
        if other is None:
            return name
        differing[name] = other
    said = "; ".join(f"{name} reads {text!r} otherwise" for name, text in differing.items())
    raise ConfigError([
        f"{tokenizer.folder}: no class of transformers gives the ids of its tokenizer.json ({said}): settings in "
        f"{CONFIG} change them, such as a special token that is not in tokenizer.json. Training did not use these "
        "settings: take them out"
    ])  # fmt: skip


def compared_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts that tell readers of a tokenizer apart, some with its own special tokens."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special][:_SPECIAL_TOKENS]
    return [*_TEXTS, *(text.format(token) for token in special for text in _AFTER_SPECIAL)]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
