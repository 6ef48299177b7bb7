from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_engines import documents

from moba_megatron.corpus.engines import Encoder
from moba_megatron.corpus.tokenizer import Tokenizer, copy_tokenizer, fingerprint, train_bpe


def edited(tokenizer: Tokenizer, folder: Path, **changes: object) -> Path:
    """A copy of a tokenizer folder with other values in tokenizer.json."""
    shutil.copytree(tokenizer.folder, folder)
    tree = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tree | changes))
    return folder


def test_text_survives_the_round_trip(tokenizer: Tokenizer, texts: list[str]):
    assert tokenizer.vocab_size == 400
    assert (tokenizer.eod_token, tokenizer.eod_id) == ("<|endoftext|>", 0)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


def test_transformers_loads_the_trained_tokenizer(tokenizer: Tokenizer, texts: list[str]):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer.folder)
    assert loaded.eos_token_id == tokenizer.eod_id
    assert len(loaded) == tokenizer.vocab_size
    assert loaded(texts[:5], add_special_tokens=False)["input_ids"] == tokenizer.encode_batch(texts[:5])


def test_training_is_repeatable_and_refuses_too_little_text(tokenizer: Tokenizer, texts: list[str], tmp_path: Path):
    again = train_bpe(iter(texts), 400, tmp_path / "again")
    assert (again.folder / "tokenizer.json").read_bytes() == (tokenizer.folder / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="yields 2.. tokenizer entries, not tokenizer.vocab_size = 5000"):
        train_bpe(["too short"], 5000, tmp_path / "short")


def test_the_fingerprint_knows_what_decides_the_ids(tokenizer: Tokenizer, texts: list[str], tmp_path: Path):
    own = fingerprint(tokenizer.folder)
    tree = json.loads((tokenizer.folder / "tokenizer.json").read_text())
    same = {
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "decoder": None,
        "model": tree["model"] | {"merges": [" ".join(m) for m in tree["model"]["merges"]], "fuse_unk": False},
    }
    for key, value in same.items():
        assert fingerprint(edited(tokenizer, tmp_path / f"same_{key}", **{key: value})) == own, key
    assert Tokenizer(tmp_path / "same_truncation").encode_batch(texts) == tokenizer.encode_batch(texts)
    other = {
        "model": tree["model"] | {"merges": tree["model"]["merges"][:-1]},
        "normalizer": {"type": "Lowercase"},
    }
    for key, value in other.items():
        assert fingerprint(edited(tokenizer, tmp_path / f"other_{key}", **{key: value})) != own, key


def test_the_end_of_document_token_can_be_named(tokenizer: Tokenizer, tmp_path: Path):
    named = copy_tokenizer(tokenizer.folder, tmp_path / "named", "!")
    assert named.eod_token == "!" and named.eod_id == tokenizer.backend.token_to_id("!")
    assert Tokenizer(named.folder).eod_id == named.eod_id
    assert named.fingerprint != tokenizer.fingerprint
    assert named.fingerprint == fingerprint(tokenizer.folder, "!")
    with pytest.raises(ValueError, match="'<none>' is not in the vocabulary"):
        copy_tokenizer(tokenizer.folder, tmp_path / "wrong", "<none>")
    encoded = Encoder(named, "tokenizers").encode(documents(["go", "stop!", "on"]))
    assert encoded.refused == [1] and encoded.lengths[1] == 0 and named.eod_id not in encoded.ids
    assert encoded.lengths.sum() == encoded.ids.size


def test_a_missing_tokenizer_is_explained(tmp_path: Path):
    with pytest.raises(ValueError, match="needs a tokenizer.json"):
        Tokenizer(tmp_path)
