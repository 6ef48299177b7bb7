"""Documents to ids: the same by both engines; where tokens of a prompt end and those of an answer begin; special
tokens; beginnings."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from moba_megatron.corpus.documents import CorpusError, Document, make_segmented
from moba_megatron.corpus.engines import END_IN_TEXT, PROMPT_RUNS_ON, Encoder, EngineMismatch, choose_engine
from moba_megatron.corpus.tokenizer import Tokenizer, train_bpe

WORDS = ["Question: what is it? Answer: Paris", "[INST] hello [/INST] yes fine", "def f(x):\n    return x\n"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def documents(texts: list[str]) -> list[Document]:
    return [Document(number, ((text, True),), len(text.encode()), None, b"") for number, text in enumerate(texts)]


def rows(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    encoded = encoder.encode(documents(texts))
    assert not encoded.refused and encoded.counts is None
    return [row.tolist() for row in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])]


def sentencepiece(kind: str) -> Backend:
    """Like a converted SentencePiece model: a space before each text, by the normalizer or by the pre-tokenizer."""
    if kind == "unigram":
        backend = Backend(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    else:
        backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokens = SPECIAL + [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=tokens, show_progress=False)
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "first" if kind == "first" else "always"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=kind == "unigram")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.train_from_iterator(WORDS * 9, trainer)
    tree = json.loads(backend.to_str())
    tree["added_tokens"] = tree["added_tokens"][: len(SPECIAL)]
    return Backend.from_str(json.dumps(tree))


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(WORDS * 9, trainer)
    # As in Llama 3, special tokens are in no vocabulary but their own; the offsets of words leave out their spaces.
    backend.add_special_tokens(SPECIAL)
    begin = [("<s>", backend.token_to_id("<s>"))]
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return backend


def folder_of(backend: Backend, folder: Path, **config: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


KINDS = {"byte_level": byte_level} | {
    kind: lambda kind=kind: sentencepiece(kind) for kind in ("prepend", "first", "always", "unigram")
}


@pytest.fixture(params=KINDS)
def any_tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return Tokenizer(folder_of(KINDS[request.param](), tmp_path / request.param))


@pytest.mark.parametrize("engine", ["gigatoken", "tokenizers"])
def test_both_engines_give_the_ids_of_tokenizers(tokenizer: Tokenizer, texts: list[str], engine: str):
    if engine == "gigatoken":
        pytest.importorskip("gigatoken")
        assert choose_engine(tokenizer, "auto", texts=True)[0] == "gigatoken"
    encoder = Encoder(tokenizer, engine)
    texts = [*texts, "", "x"]
    assert rows(encoder, texts) == tokenizer.encode_batch(texts)
    encoder.check(documents(texts))
    # The end-of-document token in a text is text.
    marked = ["a<|endoftext|>b", *texts, "<|endoftext|>"]
    encoded = rows(encoder, marked)
    assert encoded[1:-1] == tokenizer.encode_batch(texts)
    assert all(tokenizer.eod_id not in row for row in encoded)
    assert [tokenizer.decode(encoded[n]) for n in (0, -1)] == ["a<|endoftext|>b", "<|endoftext|>"]
    assert encoder.encode(documents(marked)).notes == {END_IN_TEXT: [0, len(marked) - 1]}


def test_a_wrong_engine_is_found_out(tokenizer: Tokenizer, texts: list[str], tmp_path: Path):
    gigatoken = pytest.importorskip("gigatoken")
    encoder = Encoder(tokenizer, "gigatoken")
    encoder.fast = gigatoken.Tokenizer(train_bpe(texts, 300, tmp_path).backend)
    with pytest.raises(EngineMismatch, match="different ids"):
        encoder.check(documents(texts))


def test_what_gigatoken_does_not_know_is_left_to_tokenizers():
    pytest.importorskip("gigatoken")
    words = Tokenizer(Path(__file__).parents[1] / "assets/tokens/tokenizer")
    engine, reason = choose_engine(words, "auto", texts=True)
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
        encoded = encoder.encode(documents(texts))
        assert encoded.refused == [2, 4] and own.eod_id not in encoded.ids
        kept = [text for number, text in enumerate(texts) if number not in encoded.refused]
        assert encoded.ids.tolist() == [i for row in own.encode_batch(kept) for i in row]
        assert encoded.lengths.sum() == encoded.ids.size


def test_the_end_of_document_token_in_a_text_leaves_other_special_tokens_alone(any_tokenizer: Tokenizer):
    """Whether or not it is in the model's own vocabulary as well, and other tokens come after it."""
    own = any_tokenizer
    start, end = (own.backend.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert own.eod_token == "</s>"
    encoded = Encoder(own, "tokenizers").encode(documents(["<|im_start|>user hello<|im_end|> </s> yes"]))
    if encoded.refused:
        # A Unigram model has the token as an entry of its own, which no setting takes out.
        assert type(own.backend.model).__name__ == "Unigram"
        return
    assert encoded.ids[0] == start and np.count_nonzero(encoded.ids == end) == 1
    assert own.eod_id not in encoded.ids
    assert own.decode(encoded.ids).replace(" ", "") == "<|im_start|>userhello<|im_end|></s>yes"


def test_a_prompt_and_its_answer_have_the_ids_of_the_whole(any_tokenizer: Tokenizer):
    """Over random places of the cut: each token counts if its first character is the answer's."""
    own, generator = any_tokenizer, random.Random(0)
    whole = "Question: what is it?\n\n  Answer: Paris, é€ 漢字 <|im_end|> yes  fine"
    cuts = [generator.randrange(1, len(whole)) for _ in range(60)]
    pairs = [make_segmented([(whole[:cut], False), (whole[cut:], True)], n) for n, cut in enumerate(cuts)]
    encoded = Encoder(own, "tokenizers").encode(pairs)
    (ids,) = own.encode_batch([whole])
    reference = Backend.from_str(own.backend.to_str())
    reference.post_processor = None
    starts = [start for start, _ in reference.encode(whole, add_special_tokens=False).offsets]
    edges = np.cumsum(encoded.lengths)[:-1]
    assert all(row.tolist() == ids for row in np.split(encoded.ids, edges))
    for cut, counts in zip(cuts, np.split(encoded.counts, edges), strict=True):
        assert counts.tolist() == [start >= cut for start in starts]
    prompts = own.encode_batch([whole[:cut] for cut in cuts])
    runs_on = [n for n, prompt in enumerate(prompts) if ids[: len(prompt)] != prompt]
    assert encoded.notes.get(PROMPT_RUNS_ON, []) == runs_on and 0 < len(runs_on) < len(cuts)


def test_documents_begin_as_asked(any_tokenizer: Tokenizer):
    from transformers import PreTrainedTokenizerFast

    own = any_tokenizer
    begin = own.backend.token_to_id("<s>")
    sent = PreTrainedTokenizerFast.from_pretrained(str(own.folder))
    auto = own.beginnings("auto")
    pair = make_segmented([("Question:", False), (" Paris", True)], 0)
    encoded = Encoder(own, "tokenizers", auto).encode([pair, pair])
    prompt = sent("Question: Paris").input_ids
    assert encoded.ids.tolist() == prompt * 2
    assert not encoded.counts[0] and encoded.counts[len(prompt) - 1]
    assert rows(Encoder(own, "tokenizers", auto), ["hello"]) == own.encode_batch(["hello"])
    for name, start in (("none", []), ("<s>", [begin])):
        encoder = Encoder(own, "tokenizers", own.beginnings(name))
        (plain,) = own.encode_batch(["hello"])
        assert rows(encoder, ["hello", "hello"]) == [start + plain] * 2
        assert encoder.encode([pair]).ids.tolist() == start + own.encode_batch(["Question: Paris"])[0]
    # None gets a second beginning.
    assert rows(Encoder(own, "tokenizers", own.beginnings("<s>")), ["<s>hello"]) == own.encode_batch(["<s>hello"])
    with pytest.raises(CorpusError, match="tokenizer.begin_of_document = '<none>' is not in the vocabulary"):
        own.beginnings("<none>")
