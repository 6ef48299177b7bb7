from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers

from moba_megatron.corpus.tokenizer import (
    Encoder,
    EngineMismatch,
    Tokenizer,
    choose_engine,
    copy_tokenizer,
    fingerprint,
    train_bpe,
)


def edited(tokenizer: Tokenizer, folder: Path, **changes: object) -> Path:
    """A copy of a tokenizer folder with other values in tokenizer.json."""
    shutil.copytree(tokenizer.folder, folder)
    tree = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tree | changes))
    return folder


def rows(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    ids, lengths, refused = encoder.encode(texts)
    assert not refused
    return [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])]


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


@pytest.mark.parametrize("engine", ["gigatoken", "tokenizers"])
def test_both_engines_give_the_ids_of_tokenizers(tokenizer: Tokenizer, texts: list[str], engine: str):
    if engine == "gigatoken":
        pytest.importorskip("gigatoken")
        assert choose_engine(tokenizer, "auto")[0] == "gigatoken"
    encoder = Encoder(tokenizer, engine)
    texts = [*texts, "", "x"]
    assert rows(encoder, texts) == tokenizer.encode_batch(texts)
    encoder.check(texts)
    # The end-of-document token in a text is text.
    marked = ["a<|endoftext|>b", *texts, "<|endoftext|>"]
    encoded = rows(encoder, marked)
    assert encoded[1:-1] == tokenizer.encode_batch(texts)
    assert all(tokenizer.eod_id not in row for row in encoded)
    assert [tokenizer.decode(encoded[n]) for n in (0, -1)] == ["a<|endoftext|>b", "<|endoftext|>"]


def test_a_wrong_engine_is_found_out(tokenizer: Tokenizer, texts: list[str], tmp_path: Path):
    gigatoken = pytest.importorskip("gigatoken")
    encoder = Encoder(tokenizer, "gigatoken")
    encoder.fast = gigatoken.Tokenizer(train_bpe(texts, 300, tmp_path).backend)
    with pytest.raises(EngineMismatch, match="different ids"):
        encoder.check(texts)


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
    ids, lengths, refused = Encoder(named, "tokenizers").encode(["go", "stop!", "on"])
    assert refused == [1] and lengths[1] == 0 and lengths.sum() == ids.size and named.eod_id not in ids


def test_a_missing_tokenizer_is_explained(tmp_path: Path):
    with pytest.raises(ValueError, match="needs a tokenizer.json"):
        Tokenizer(tmp_path)


def test_what_gigatoken_does_not_know_is_left_to_tokenizers():
    pytest.importorskip("gigatoken")
    words = Tokenizer(Path(__file__).parents[1] / "assets/tokens/tokenizer")
    engine, reason = choose_engine(words, "auto")
    assert engine == "tokenizers"
    assert reason.startswith("gigatoken cannot load this tokenizer: ") and "WordLevel" in reason and "\n" not in reason
    assert rows(Encoder(words, engine), ["w5 w7", "w9"]) == [[5, 7], [9]]


@pytest.mark.parametrize("special", [True, False])
def test_a_normalizer_cannot_bring_the_end_of_document_id_into_a_text(
    tokenizer: Tokenizer, tmp_path: Path, special: bool
):
    tree = Tokenizer(tokenizer.folder).backend
    tree.normalizer = normalizers.NFKC()
    tree.add_tokens([AddedToken("</s>", normalized=True, special=special)])
    tree.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"end_of_document": "</s>"}')
    own = Tokenizer(tmp_path)
    texts = ["", "plain", "a \uff1c/s\uff1e b", "", "\uff1c/s\uff1e", "end"]
    assert own.eod_token not in "".join(texts)
    assert [own.eod_id in ids for ids in own.encode_batch(texts)] == [False, False, True, False, True, False]
    encoder = Encoder(own, "tokenizers")
    if special:
        encoded = rows(encoder, texts)
        assert not any(own.eod_id in row for row in encoded)
        assert [own.decode(row) for row in encoded] == ["", "plain", "a </s> b", "", "</s>", "end"]
    else:
        ids, lengths, refused = encoder.encode(texts)
        assert refused == [2, 4] and own.eod_id not in ids
        kept = [text for number, text in enumerate(texts) if number not in refused]
        assert ids.tolist() == [i for row in own.encode_batch(kept) for i in row] and lengths.sum() == ids.size
