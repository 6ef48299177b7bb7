"""Scores of tasks: against greedy decoding and whole logits, under both attentions, from the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import typer
from distributed import run_ranks
from small_run import small_config, train_here
from typer.testing import CliRunner

from moba_megatron.cli import app
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.corpus.prepare import prepare
from moba_megatron.corpus.recipe import load_recipe
from moba_megatron.evaluation.tasks import TASKS, Sample, make_samples
from moba_megatron.evaluation.tasks.corpus import write_corpus
from moba_megatron.evaluation.tasks.heat_map import main as draw_heat_maps
from moba_megatron.evaluation.tasks.heat_map import read_places
from moba_megatron.evaluation.tasks.opened_model import OpenedTaskModel
from moba_megatron.evaluation.tasks.scoring import score_sample


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of four steps on samples of two tasks, from the corpus by `prepare` and packed; window of 256 tokens."""
    folder = tmp_path_factory.mktemp("tasks")
    write_corpus(folder / "samples", ["needle", "multi_value"], [64, 128, 256], tokens=16000, seed=1)
    prepare(load_recipe(folder / "samples/recipe.yaml"), folder / "data", workers=1)
    config = small_config(
        folder,
        data__train=str(folder / "data/train"),
        data__validation=None,
        data__tokenizer=str(folder / "data/tokenizer"),
        data__sequence_length=256,
        data__packing="best_fit",
        training__steps=4,
        model__init_method_std=0.3,
    )
    run_ranks(1, train_here, config)
    return Path(config.run.dir)


def test_the_corpus_keeps_within_its_lengths_and_teaches_answers_only(run):
    from moba_megatron.corpus.indexed import read_index
    from moba_megatron.corpus.tokenizer import Tokenizer

    data, rows = run.parent / "data", (run.parent / "samples/samples.jsonl").read_text().splitlines()
    tokenizer = Tokenizer(data / "tokenizer")
    lengths = {sum(map(len, tokenizer.encode_batch(list(json.loads(row).values())))) + 1 for row in rows}
    assert max(lengths) == 256 and all(any(0.93 * asked <= n <= asked for asked in (64, 128, 256)) for n in lengths)
    # No word of the tasks is unknown.
    assert all(1 not in ids for row in rows for ids in tokenizer.encode_batch(list(json.loads(row).values())))
    counted = (data / "train.loss_mask.bin").read_bytes()
    assert len(counted) == read_index(data / "train").tokens
    first = json.loads(rows[0])
    assert first["answer"].count(first["prompt"].rsplit("\n", 1)[1]) == 1
    assert 0 < sum(counted) < len(counted) / 2


def _on_one_core():
    """A model takes as many threads as there are cores, and on a busy machine they wait for each other."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def _score_directly(folder):
    """Scores of samples under both attentions, and the same from whole logits and from decoding token by token."""
    from moba_megatron.corpus.tokenizer import Tokenizer
    from moba_megatron.evaluation.subject import open_subject

    _on_one_core()
    subject = open_subject(folder, on_validation=False)
    tokenizer = Tokenizer(subject.config.data.tokenizer)
    model, (chunk,) = OpenedTaskModel(subject.opened), subject.opened.model

    def whole_logits(ids):
        with torch.no_grad():
            return chunk(torch.tensor([ids]), torch.arange(len(ids))[None], None)[0].float()

    found = []
    for attention in subject.attentions:
        subject.attend(attention)
        for sample in make_samples("multi_value", tokenizer=tokenizer, length=250, count=2, seed=0):
            prompt, target, *wrong = tokenizer.encode_batch([sample.prompt, sample.target, *sample.distractors])
            decoded = list(prompt)
            for _ in target:
                decoded.append(int(whole_logits(decoded)[-1].argmax()))
            said = tokenizer.decode(decoded[len(prompt) :])
            totals = []
            for candidate in (target, *wrong):
                logs = whole_logits(prompt + candidate).log_softmax(-1)[len(prompt) - 1 : -1]
                totals.append(float(logs.gather(1, torch.tensor(candidate)[:, None]).sum()))
            right = Sample(sample.task, sample.prompt, [said], 0, None)
            found.append(
                (score_sample(model, tokenizer, sample), totals, len(target), score_sample(model, tokenizer, right))
            )
    return found


def test_scores_are_those_of_whole_logits_and_of_greedy_decoding(run):
    [found] = run_ranks(1, _score_directly, run, prepare=False)
    for score, totals, tokens, greedy in found:
        assert score.answer_nats == pytest.approx(-totals[0] / tokens, rel=1e-4)
        assert score.ranked_first == (totals[0] > max(totals[1:]))
        # What decoding says is a match, and the target of a hardly trained model is not.
        assert greedy.greedy_match and greedy.ranked_first is None
        assert not score.greedy_match
    moba, full = found[:2], found[2:]
    assert [s[0].answer_nats for s in moba] != pytest.approx([s[0].answer_nats for s in full], rel=1e-4)


class CountingModel:
    """Likes the id that follows the last one in the alphabet; counts its passes."""

    def __init__(self, size: int):
        self.size, self.passes = size, 0

    def last_logits(self, ids, last):
        self.passes += 1
        return torch.nn.functional.one_hot((torch.tensor(ids[-last:]) + 1) % self.size, self.size).float() * 20


class Letters:
    def encode_batch(self, texts):
        return [[ord(letter) - 96 for letter in text if letter != " "] for text in texts]


def test_candidates_that_differ_in_the_last_token_share_a_pass():
    model = CountingModel(27)
    sample = Sample("needle", "ab", ["cde"], 5, None, [" cdf", " cdg", " xde"])
    score = score_sample(model, Letters(), sample)
    assert model.passes == 2
    assert score.greedy_match and score.ranked_first and score.answer_nats == pytest.approx(0, abs=1e-6)
    worse = score_sample(model, Letters(), Sample("needle", "ab", ["cdf"], 5, None, [" cde"]))
    assert not worse.greedy_match and not worse.ranked_first and worse.answer_nats > 5


def _evaluate(*arguments):
    _on_one_core()
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_command_writes_a_record_a_line_and_a_heat_map(run):
    arguments = (run, "--tasks", "all", "--lengths", "128,256", "--depths", "0,1", "--task-samples", "1")
    [(code, output)] = run_ranks(1, _evaluate, *arguments, prepare=False)
    assert code == 0, output
    for attention in ("moba", "full"):
        record = json.loads((run / f"evaluation/tasks_step_4_{attention}.json").read_text())
        assert record["haystack"] == "noise" and record["window"] == 256 and record["lengths"] == [128, 256]
        with_depth = sum(task.has_depth for task in TASKS.values())
        assert len(record["cells"]) == 2 * (2 * with_depth + len(TASKS) - with_depth)
        assert {cell["samples"] for cell in record["cells"] if cell["depth"] is None} == {2}
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    tasks = [line for line in lines if line.get("kind") == "tasks"]
    assert [line["attention"] for line in tasks] == ["moba", "full"]
    assert tasks[0]["needle_256_answer_nats"] > 0
    # Another call replaces the cells of its tasks, and no others.
    again = (run, "--tasks", "needle", "--lengths", "200", "--depths", "0", "--task-samples", "1")
    [(code, output)] = run_ranks(1, _evaluate, *again, "--attention", "full", prepare=False)
    assert code == 0, output
    cells = json.loads((run / "evaluation/tasks_step_4_full.json").read_text())["cells"]
    assert [cell["length"] for cell in cells if cell["task"] == "needle"] == [200]
    assert [cell for cell in cells if cell["task"] != "needle"] == [c for c in record["cells"] if c["task"] != "needle"]
    picture = run / "plots/tasks_needle_step_4.png"
    assert picture.stat().st_size > 5000 and not (run / "plots/tasks_multi_value_step_4.png").exists()


def test_an_export_scores_like_its_checkpoint(run, tmp_path):
    def export():
        export_huggingface(open_exported(run), tmp_path / "exported")

    run_ranks(1, export, prepare=False)
    for target in (run, tmp_path / "exported"):
        arguments = (target, "--tasks", "needle", "--lengths", "200", "--depths", "0,1", "--task-samples", "1")
        [(code, output)] = run_ranks(1, _evaluate, *arguments, prepare=False)
        assert code == 0, output
    for attention in ("moba", "full"):
        ours = json.loads((run / f"evaluation/tasks_step_4_{attention}.json").read_text())
        theirs = json.loads((tmp_path / f"exported/evaluation/tasks_{attention}.json").read_text())
        assert theirs["window"] == ours["window"] and len(theirs["cells"]) == 2
        needle = [cell for cell in ours["cells"] if cell["task"] == "needle"]
        for one, other in zip(needle, theirs["cells"], strict=True):
            assert other["answer_nats"] == pytest.approx(one["answer_nats"], rel=1e-4)
    arguments = (tmp_path / "exported", "--tasks", "needle", "--lengths", "300")
    [(code, output)] = run_ranks(1, _evaluate, *arguments, prepare=False)
    assert code == 2 and "over the model's window of 256 tokens (max_position_embeddings)" in output


def test_records_of_several_runs_make_one_picture(run, tmp_path):
    cells = [{"task": "needle", "length": n, "depth": d, "greedy_match": 0.5} for n in (128, 256) for d in (0.0, 1.0)]
    for name, kept in (("one", cells), ("two", cells), ("other", cells[:2])):
        (tmp_path / name).write_text(json.dumps({"cells": kept}))
    assert [(p.length, p.depth) for p in read_places(tmp_path / "other", "needle")] == [(128, 0.0), (128, 1.0)]
    records = [f"{name}={tmp_path / name}" for name in ("one", "two", "other")]
    draw_heat_maps(tmp_path / "both.png", records[:2], "needle")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    for wrong in (records, ["one"], [f"gone={tmp_path / 'gone'}"]):
        with pytest.raises(typer.Exit) as stopped:
            draw_heat_maps(tmp_path / "wrong.png", wrong, "needle")
        assert stopped.value.exit_code == 2 and not (tmp_path / "wrong.png").exists()


def test_a_corpus_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        write_corpus(tmp_path / "corpus", ["needle"], [8], tokens=100, seed=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lengths", "512"), "--lengths 512 is over the model's window of 256 tokens"),
        (("--lengths", "1x"), "'1x' is not a number of tokens such as 4096 or 32K"),
        (("--lengths", "16"), "does not fit into 16 tokens"),
        (("--depths", "half"), "'half' is not a number from 0"),
        (("--depths", "1.5"), "'1.5' is not a number from 0"),
        (("--haystack", "nowhere"), "neither a text file nor the prefix of a dataset"),
        (("--tasks", "needles"), "needles is not a task; there are needle, multi_key"),
        (("--samples", "2", "--trailing", "8"), "--samples, --trailing without the losses: add --losses"),
    ],
)
def test_mistakes_end_with_code_2_and_the_fix(run, arguments, message):
    [(code, output)] = run_ranks(1, _evaluate, run, "--tasks", "needle", *arguments, prepare=False)
    assert code == 2 and message in output


def test_options_of_tasks_want_tasks(run):
    [(code, output)] = run_ranks(1, _evaluate, run, "--haystack", "text.txt", prepare=False)
    assert code == 2 and "--haystack text.txt without --tasks or --ruler" in output
