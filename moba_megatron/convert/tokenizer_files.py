"""The tokenizer of a converted model: its files, its special ids, and whether transformers reads it as it is meant.

`AutoTokenizer` of transformers 5 goes by `model_type` where `tokenizer_class` is not given, and for Qwen 2 even where
it is: it builds that family's own tokenizer around the vocabulary, which cuts text in another way and gives other ids
without a word. So the class is always written, and the ids are compared.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from moba_megatron.corpus.tokenizer import TOKENIZER_FILES, Tokenizer

CONFIG = "tokenizer_config.json"
# Beside what a dataset keeps: the forms of families that transformers reads without tokenizer.json.
FILES = (*TOKENIZER_FILES, "tokenizer.model", "vocab.json", "merges.txt")
TEXT = """Everyone has the right to freedom of opinion and expression; this right includes freedom to hold opinions
without interference and to seek, receive and impart information and ideas through any media.

\tw12 = 34567  # 東京
"""


def copy_tokenizer_files(source: Path, folder: Path) -> None:
    """Copy what there is of a tokenizer, and of generation settings beside it."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def complete_tokenizer_config(folder: Path, eos_token: str) -> None:
    """Write what transformers needs and the folder does not say: the class that reads any `tokenizer.json`, and the
    token that ends a text."""
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
    the automatic choice is wrong."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False).input_ids
    return "AutoTokenizer" if ids == tokenizer.encode_batch([TEXT])[0] else "PreTrainedTokenizerFast"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
