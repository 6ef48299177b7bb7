"""EleutherAI's harness on exported models: MoBA is what is measured, nothing is cut, results stay in the run folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from distributed import run_ranks
from rich.console import Console
from small_run import TOKENS, read_metrics, small_config, train_here
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from moba_megatron.checkpoint import CheckpointError
from moba_megatron.cli import app
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.corpus.tokenizer import Tokenizer, train_bpe
from moba_megatron.evaluation.lm_eval.run import HarnessSettings, evaluate_with_harness
from moba_megatron.evaluation.lm_eval.tasks import (
    METRIC,
    RULER,
    RulerSettings,
    share_of_answers,
    write_tasks,
)
from moba_megatron.evaluation.tasks import TASKS, make_samples
from moba_megatron.generation.engine import continue_prompt
from moba_megatron.generation.loading import load_generator

pytest.importorskip("lm_eval")
NEW_TOKENS = 8
# The harness calls the log-likelihood of an answer "perplexity" until it is aggregated; here it is the mean.
LIKELIHOOD = {
    "output_type": "loglikelihood",
    "metric_list": [{"metric": "perplexity", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """The harness reads data through `datasets`, which keeps a copy."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """MoBA in three of four layers, blocks of 16, three of them: full attention up to 48 of 128 tokens."""
    config = small_config(tmp_path_factory.mktemp("trained"), training__steps=4, model__init_method_std=0.3)
    run_ranks(1, train_here, config)
    return Path(config.run.dir)


def words(stream: random.Random, count: int) -> str:
    return " ".join(f"w{stream.randrange(2, 127)}" for _ in range(count))


def write_task(folder: Path, name: str, rows: list[dict], **values) -> None:
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "metadata": {"version": 1.0},
        **values,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def write_likelihood_task(folder: Path, name: str, length: int) -> list[dict]:
    stream = random.Random(name)
    rows = [{"text": words(stream, length), "answer": f" {words(stream, 3)}"} for _ in range(3)]
    write_task(folder, name, rows, **LIKELIHOOD)
    return rows


def write_generation_task(folder: Path, name: str, source: Path, length: int = 100) -> None:
    """Its answers are what our own engine generates from `source`."""
    stream, generator = random.Random(name), load_generator(source)
    rows = []
    for _ in range(3):
        text = words(stream, length)
        ids = generator.encode(text)
        new = continue_prompt(
            generator.model, ids, max_new_tokens=NEW_TOKENS, temperature=0.0, stop_ids=generator.stop_ids
        )
        rows.append({"text": text, "answer": generator.decode(list(new))})
    write_task(
        folder,
        name,
        rows,
        output_type="generate_until",
        generation_kwargs={"do_sample": False, "max_gen_toks": NEW_TOKENS, "until": []},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )


def evaluate(target: Path, *tasks: str, folder: Path | None = None, attention: str | None = None, **settings):
    """The recorded results by attention."""
    console = Console(quiet=True)
    files = evaluate_with_harness(target, HarnessSettings(tasks, folder, **settings), console, attention=attention)
    records = [json.loads(file.read_text()) for file in files]
    return {record["attention"]: record["tasks"] for record in records}


def likelihood_by_hand(source: Path, rows: list[dict], attention: str) -> float:
    """From one pass over each text, without the harness."""
    generator = load_generator(source)
    generator.model.set_attn_implementation(attention)
    total = 0.0
    for row in rows:
        context, answer = (generator.encode(row[key]) for key in ("text", "answer"))
        with torch.no_grad():
            logits = generator.model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
        total += float(logits.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).sum())
    return total / len(rows)


def test_moba_is_measured_where_it_differs_and_full_attention_is_one_flag_away(run, tmp_path):
    rows = {name: write_likelihood_task(tmp_path, name, length) for name, length in (("far", 100), ("near", 30))}
    found = evaluate(run, "far", "near", folder=tmp_path, attention="both")
    values = {(kind, name): found[kind][name]["metrics"]["perplexity"] for kind in found for name in rows}
    for (kind, name), value in values.items():
        expected = likelihood_by_hand(run, rows[name], "moba" if kind == "moba" else "sdpa")
        assert value == pytest.approx(expected, rel=1e-4)
    assert abs(values["moba", "far"] - values["full", "far"]) > 0.01
    assert values["moba", "near"] == pytest.approx(values["full", "near"], rel=1e-4)


def test_batches_give_what_single_texts_give(run, tmp_path):
    stream = random.Random(0)
    rows = [{"text": words(stream, length), "answer": f" {words(stream, 3)}"} for length in (100, 60, 20)]
    write_task(tmp_path, "mixed", rows, **LIKELIHOOD)
    alone, together = (
        evaluate(run, "mixed", folder=tmp_path, batch_size=size)["moba"]["mixed"]["metrics"]["perplexity"]
        for size in (1, 3)
    )
    assert together == pytest.approx(alone, rel=1e-4)


def test_generation_is_that_of_our_engine_in_the_model_s_own_decode_mode(run, tmp_path):
    decodes_moba = tmp_path / "decodes_moba"
    export_huggingface(open_exported(run), decodes_moba, decode="moba")
    tasks = tmp_path / "tasks"
    write_generation_task(tasks, "decode_full", run)
    write_generation_task(tasks, "decode_moba", decodes_moba)
    by_run = evaluate(run, "decode_full", "decode_moba", folder=tasks, attention="both")
    by_folder = evaluate(decodes_moba, "decode_full", "decode_moba", folder=tasks)["moba"]

    def score(found: dict, name: str) -> float:
        return found[name]["metrics"]["exact_match"]

    assert score(by_run["moba"], "decode_full") == 1.0 and score(by_run["moba"], "decode_moba") < 1.0
    assert score(by_folder, "decode_moba") == 1.0 and score(by_folder, "decode_full") < 1.0
    assert score(by_run["full"], "decode_full") < 1.0


def test_results_stay_in_the_run_folder_and_the_export_is_made_once(run, tmp_path):
    write_likelihood_task(tmp_path, "one", 20)
    write_likelihood_task(tmp_path, "two", 20)
    evaluate(run, "one", folder=tmp_path)
    weights = run / "exports/step_4/model.safetensors"
    made = weights.stat().st_mtime_ns
    found = evaluate(run / "checkpoints/step_4", "two", folder=tmp_path, limit=2)["moba"]
    assert weights.stat().st_mtime_ns == made
    assert {"one", "two"} <= found.keys(), "earlier tasks of the file were lost"
    assert found["two"]["samples"] == {"original": 3, "effective": 2}
    line = read_metrics(run, "evaluations.jsonl")[-1]
    assert (line["kind"], line["attention"], line["step"], line["limit"]) == ("lm_eval", "moba", 4, 2)
    assert line["two/perplexity"] == found["two"]["metrics"]["perplexity"]


def test_a_chat_template_asks_and_results_go_where_asked(run, tmp_path):
    model = tmp_path / "model"
    export_huggingface(open_exported(run), model)
    rows = write_likelihood_task(tmp_path, "asked", 60)
    with pytest.raises(ValueError, match="--lm-eval-chat: the tokenizer of .*/model has no chat template"):
        evaluate(model, "asked", folder=tmp_path, chat=True)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ {'system': 'w2', 'user': 'w3', 'assistant': 'w4'}[m.role] }} {{ m.content }} "
        "{% endfor %}{% if add_generation_prompt %}w4{% endif %}"
    )
    settings = HarnessSettings(("asked",), tmp_path, chat=True, system="w9")
    before = sorted(path for path in model.rglob("*"))
    (file,) = evaluate_with_harness(model, settings, Console(quiet=True), output=tmp_path / "results")
    assert file.is_relative_to(tmp_path / "results") and sorted(path for path in model.rglob("*")) == before
    found = json.loads(file.read_text())["tasks"]["asked"]
    asked = [{"text": f"w2 w9 w3 {row['text']} w4", "answer": row["answer"]} for row in rows]
    assert found["metrics"]["perplexity"] == pytest.approx(likelihood_by_hand(model, asked, "moba"), rel=1e-4)
    assert (found["chat_template"], found["system"]) == (True, "w9")


def test_an_export_of_other_weights_is_not_used(run, tmp_path):
    write_likelihood_task(tmp_path, "one", 20)
    evaluate(run, "one", folder=tmp_path)
    source = run / "exports/step_4/exported_from.json"
    right = source.read_text()
    source.write_text(json.dumps({**json.loads(right), "checkpoint_blake2b": "00"}))
    try:
        with pytest.raises(CheckpointError, match="not the export of .*step_4"):
            evaluate(run, "one", folder=tmp_path)
    finally:
        source.write_text(right)


def test_what_does_not_fit_the_window_is_refused_not_cut(run, tmp_path):
    write_likelihood_task(tmp_path, "fits", 126)
    evaluate(run, "fits", folder=tmp_path)
    write_likelihood_task(tmp_path, "long", 127)
    with pytest.raises(ValueError, match="129 tokens .* window is 128"):
        evaluate(run, "long", folder=tmp_path)
    write_generation_task(tmp_path, "long_prompt", run, length=123)
    with pytest.raises(ValueError, match=r"131 tokens \(prompt and 8 tokens to generate\)"):
        evaluate(run, "long_prompt", folder=tmp_path)


def command(*options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["evaluate", *options])
    return done.exit_code, " ".join(done.output.split())


def test_mistakes_end_with_what_to_do(run, tmp_path):
    write_likelihood_task(tmp_path / "tasks", "one", 20)
    given = [str(run), "--lm-eval-tasks", str(tmp_path / "tasks"), "--lm-eval"]
    code, said = command(*given, "on")
    assert code == 2 and "no task, group or tag 'on'" in said
    code, said = command(str(run), "--lm-eval", "one", "--lm-eval-tasks", str(tmp_path / "nowhere"))
    assert code == 2 and "no such folder" in said
    code, said = command(*given, "one", "--attention", "sparse")
    assert code == 2 and "moba, full or both" in said
    (tmp_path / "tasks/one.jsonl").unlink()
    code, said = command(*given, "one")
    assert code == 2 and "data of one cannot be loaded" in said
    code, said = command(str(tmp_path / "nothing"), "--lm-eval", "one")
    assert code == 2 and "neither a checkpoint nor a run folder" in said
    code, said = command(str(run), "--ruler", "4k")
    assert code == 2 and "--ruler 4k" in said and "is not a number of tokens" in said


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A stock model of 256 tokens, full attention, with a tokenizer for English."""
    folder = tmp_path_factory.mktemp("llama")
    text = " ".join(task.summary + name for name, task in TASKS.items())
    noise = make_samples("needle", tokenizer=Tokenizer(TOKENS / "tokenizer"), length=2000, count=1, seed=0)
    tokenizer = train_bpe([text, noise[0].prompt], 400, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eod_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_ruler_set_is_drawn_and_scored(llama):
    names = ("needle", "multi_value")
    found = evaluate(llama, ruler=RulerSettings((128, 256), names, samples=2))["full"]
    tasks = {f"{RULER}_{name}_{length}" for name in names for length in (128, 256)}
    assert found.keys() == tasks | {RULER, f"{RULER}_128", f"{RULER}_256"}
    assert all(0 <= entry["metrics"][METRIC] <= 1 for entry in found.values())
    assert all(found[name]["samples"]["effective"] == 2 for name in tasks)
    assert read_metrics(llama, "evaluations.jsonl")[-1]["step"] is None


def test_ruler_samples_leave_room_for_what_is_generated(llama, tmp_path):
    tokenizer = Tokenizer(llama)
    write_tasks(tmp_path, RulerSettings((200,), samples=3), tokenizer, window=200, template=1)
    for name in TASKS:
        task = yaml.safe_load((tmp_path / f"{RULER}_{name}_200.yaml").read_text().replace("!function ", ""))
        new = task["generation_kwargs"]["max_gen_toks"]
        rows = read_metrics(tmp_path, f"{RULER}_{name}_200.jsonl")
        assert len(rows) == 3
        for row in rows:
            prompt, target = (len(ids) for ids in tokenizer.encode_batch([row["prompt"], row["target"]]))
            assert target <= new and 150 < prompt + 1 + new <= 200
            assert share_of_answers(row, [row["target"]]) == {METRIC: 1.0}
            assert share_of_answers(row, [""]) == {METRIC: 0.0}


def test_ruler_lengths_beyond_the_window_are_refused(llama):
    with pytest.raises(ValueError, match=r"lengths \[512\] are over the model's window of 256"):
        evaluate(llama, ruler=RulerSettings((128, 512)))
    with pytest.raises(ValueError, match="--attention moba: no layer of this model attends by MoBA"):
        evaluate(llama, ruler=RulerSettings((128,), ("needle",), samples=1), attention="moba")
