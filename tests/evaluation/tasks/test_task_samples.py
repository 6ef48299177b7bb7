"""Samples of the synthetic tasks: their length, their answers, where things lie."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from moba_megatron.corpus.indexed import write_index
from moba_megatron.corpus.tokenizer import Tokenizer, train_bpe
from moba_megatron.evaluation.tasks import TASKS, Haystack, load_haystack, make_samples
from moba_megatron.evaluation.tasks.corpus import make_tokenizer

LENGTHS = (128, 500, 3000)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    """A tokenizer with a token for every word of the tasks."""
    return make_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Tokenizer:
    """A tokenizer of real text, for which a number may be several tokens."""
    return train_bpe([Path(__file__).read_text(), Path(re.__file__).read_text()], 400, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def source(bpe) -> Haystack:
    return load_haystack(re.__file__, bpe)


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_fills_its_length_and_never_more(name, words, bpe, source):
    for tokenizer, haystack in ((words, None), (bpe, source)):
        for length in LENGTHS:
            samples = make_samples(name, tokenizer=tokenizer, length=length, count=3, seed=1, haystack=haystack)
            assert samples == make_samples(name, tokenizer=tokenizer, length=length, count=3, seed=1, haystack=haystack)
            assert len({sample.prompt for sample in samples}) == 3
            for sample in samples:
                tokens = sum(map(len, tokenizer.encode_batch([sample.prompt, sample.target])))
                assert sample.length == tokens
                assert 0.93 * length <= tokens <= length
                assert sample.prompt == sample.prompt.strip()
                assert sample.target not in sample.distractors and len(sample.distractors) == 3


def test_other_seeds_give_other_samples(words):
    one, two = (make_samples("needle", tokenizer=words, length=128, count=1, seed=seed) for seed in (1, 2))
    assert one != two


@pytest.mark.parametrize("name", ["needle", "multi_key", "associative_recall"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_decisive_statement_lies_at_its_depth_and_answers_the_question(name, depth, words):
    for sample in make_samples(name, tokenizer=words, length=1000, count=4, seed=3, depth=depth):
        text, question = sample.prompt.rsplit("\n", 1)
        asked = question.split("number of the ")[-1].removesuffix(" is")
        separator = " " if name == "associative_recall" else " is "
        assert len(re.findall(rf"\b{asked}{separator}{sample.answers[0]}\b", text)) == 1
        assert len(re.findall(rf"\b{asked}{separator}\d+", text)) == 1
        place = text.index(f"{asked}{separator}{sample.answers[0]}") / len(text)
        assert place == pytest.approx(depth, abs=0.06)
        assert sample.depth == depth


def test_many_values_come_in_the_order_of_the_text(words):
    (sample,) = make_samples("multi_value", tokenizer=words, length=1000, count=1, seed=3)
    assert re.findall(r"is (\d+)\.", sample.prompt) == sample.answers and len(sample.answers) == 4
    assert sample.depth is None


def test_a_chain_leads_to_the_answer(words):
    for sample in make_samples("variable_tracking", tokenizer=words, length=1000, count=5, seed=3):
        said = dict(re.findall(r"Let (\w+) = (\w+)\.", sample.prompt))
        name = sample.prompt.split()[-2]
        for _ in range(4):
            name = said[name]
        assert said[name] == sample.answers[0]
        # Each variable is assigned before it is used.
        assert all(
            sample.prompt.index(f"Let {v} =") < sample.prompt.index(f"= {v}.") for v in said.values() if v in said
        )


def test_lists_repeat_their_answers_most(words):
    for name in ("common_words", "frequent_words"):
        for sample in make_samples(name, tokenizer=words, length=700, count=5, seed=3):
            listed = sample.prompt.split(".\n")[0].removeprefix("A list of words: ").split()
            ranked = sorted(set(listed), key=listed.count, reverse=True)
            counts = [listed.count(word) for word in ranked]
            assert counts[2] > counts[3]
            if name == "common_words":
                assert sorted(ranked[:3]) == sample.answers
            else:
                assert ranked[:3] == sample.answers and counts[0] > counts[1] > counts[2]


def test_a_prepared_dataset_is_a_haystack(tmp_path):
    tokens = Path(__file__).parents[2] / "assets/tokens"
    tokenizer = Tokenizer(tokens / "tokenizer")
    haystack = load_haystack(str(tokens / "validation"), tokenizer)
    assert haystack.words and haystack.name == str(tokens / "validation")
    assert set("".join(haystack.words[:3])) <= set("w0123456789 \n")


def test_a_view_is_a_haystack_of_its_own_documents_only(tmp_path, bpe):
    """Every second document of a dataset, in another order."""
    documents = [[*bpe.encode_batch([text])[0], bpe.eod_id] for text in ("one", "two hidden", "three", "four hidden")]
    ids = np.concatenate(documents).astype(np.uint16)
    ids.tofile(tmp_path / "whole.bin")
    lengths = np.array(list(map(len, documents)), np.int32)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    write_index(tmp_path / "whole", ids.dtype, 4, lambda: [lengths])
    (tmp_path / "view.bin").symlink_to("whole.bin")
    kept = [2, 0]
    write_index(tmp_path / "view", ids.dtype, 2, lambda: [lengths[kept]], lambda: [starts[kept] * 2])
    assert "".join(load_haystack(str(tmp_path / "view"), bpe).words).split() == ["three", "one"]
    assert "hidden" in "".join(load_haystack(str(tmp_path / "whole"), bpe).words)


def test_statements_follow_the_ends_of_lines_or_sentences(bpe, source):
    for sample in make_samples("needle", tokenizer=bpe, length=2000, count=5, seed=3, haystack=source, depth=0.5):
        before, after = re.split(r" The number of the \w+ is \d+\.", sample.prompt)
        assert before[-1] in '.!?;:})"' or after[0] == "\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "needles"}, "unknown task 'needles': there are needle, multi_key"),
        ({"length": 20}, "does not fit into 20 tokens: without any text around it takes"),
        ({"depth": 1.5}, "depth 1.5 is not in 0"),
        ({"name": "multi_value", "depth": 0.5}, "has no depth"),
        ({"count": 0}, "at least one"),
    ],
)
def test_what_cannot_be_is_refused(words, changes, message):
    arguments = {"name": "needle", "length": 128, "count": 1, **changes}
    with pytest.raises(ValueError, match=message):
        make_samples(arguments.pop("name"), tokenizer=words, seed=0, **arguments)


def test_a_haystack_that_is_none_is_refused(tmp_path, words):
    with pytest.raises(ValueError, match="neither a text file nor the prefix of a dataset"):
        load_haystack(str(tmp_path / "nothing"), words)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8: .* at byte 3"):
        load_haystack(str(tmp_path / "latin"), words)
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(ValueError, match="no words"):
        load_haystack(str(tmp_path / "empty"), words)
