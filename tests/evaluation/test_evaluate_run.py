"""`moba-megatron evaluate` and `report` on a small trained run: both kinds of attention of the same weights, what is
recorded where, and the page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from small_run import read_metrics, small_config, train_here
from typer.testing import CliRunner

from moba_megatron.cli import app
from moba_megatron.evaluation.evaluate_command import evaluate_command
from moba_megatron.evaluation.losses.evaluate_losses import evaluate_losses
from moba_megatron.evaluation.report.run_page import report_page
from moba_megatron.evaluation.report.run_view import view_run
from moba_megatron.evaluation.routing.capture import capture_attention
from moba_megatron.evaluation.routing.evaluate_routing import evaluate_routing
from moba_megatron.model.core_attention import MoBACoreAttention
from moba_megatron.model.schedule import LayerAttention
from moba_megatron.runs.files import append_json_line, read_json_lines
from moba_megatron.runs.folder import RunFolder, training_records
from moba_megatron.runs.records import EvaluationRecords

# Imported here once: each command runs in a process that is forked from this one.
COMMANDS = (evaluate_command, evaluate_losses, evaluate_routing)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Sparse until step 4, full until step 8; MoBA with 3 of 8 blocks in 3 of 4 layers."""
    config = small_config(
        tmp_path_factory.mktemp("trained"),
        attention__stages=[{"until": 0.5}, {"until": 1.0, "kind": "full"}],
        data__cross_document_attention=True,
        model__init_method_std=0.3,
        checkpoint__every=4,
        evaluation__every=4,
        logging__tensorboard=True,
    )
    run_ranks(1, train_here, config)
    return Path(config.run.dir)


def _invoke(arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


def call(*arguments, code=0) -> str:
    [(found, output)] = run_ranks(1, _invoke, arguments)
    assert found == code, output
    return output


def test_both_attentions_of_the_same_weights(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "moved")
    output = call("evaluate", moved / "checkpoints/step_4", "--trailing", 16)
    assert "moba attention" in output and "full attention" in output and "last 16 positions" in output
    moba, full = (json.loads((moved / "evaluation" / name).read_text()) for name in ("step_4.json", "step_4_full.json"))
    trained = training_records(read_json_lines(run / "evaluations.jsonl"))
    assert [line["step"] for line in trained] == [4, 8]
    # Step 4 was sparse: the model's own way gives what training recorded, the other way another loss.
    assert moba["loss"] == pytest.approx(trained[0]["loss"], rel=1e-6)
    by_position = [part["loss"] for part in trained[0]["by_position_log"]]
    assert [part["loss"] for part in moba["by_position_log"]] == pytest.approx(by_position, rel=1e-6)
    assert abs(full["loss"] - moba["loss"]) > 1e-4
    # 3 blocks of 16: up to position 47 MoBA attends fully.
    for place in (0, 1):
        assert moba["by_position_log"][place]["loss"] == pytest.approx(full["by_position_log"][place]["loss"], rel=1e-5)
    assert [part["end"] for part in moba["by_position_log"]] == [16, 32, 64, 128]
    assert moba["by_position_1k"][0]["tokens"] == moba["evaluated_tokens"]
    added = [line for line in read_json_lines(moved / "evaluations.jsonl") if "kind" in line]
    assert [(line["kind"], line["attention"], line["step"], line["tokens"]) for line in added] == [
        ("losses", "moba", 4, 2048),
        ("losses", "full", 4, 2048),
    ]
    assert list((moved / "tensorboard/evaluate").glob("events.*"))


def test_the_last_stage_decides_which_attention_is_the_models_own(run):
    call("evaluate", run, "--attention", "moba", "--samples", 2)
    found = json.loads((run / "evaluation/step_8_moba.json").read_text())
    assert (found["attention"], found["samples"]) == ("moba", 2)
    assert not (run / "evaluation/step_8.json").exists()


def test_routing_of_every_sparse_layer(run):
    output = call("evaluate", run / "checkpoints/step_4", "--routing", "--routing-samples", 2)
    assert "layers 1, 2, 3 (B=16 K=3): the chosen blocks hold" in output
    record = json.loads((run / "evaluation/routing_step_4_moba.json").read_text())
    assert [layer["layer"] for layer in record["layers"]] == [1, 2, 3]
    layer = record["layers"][0]
    # Two samples of 128 tokens, 8 blocks: queries of blocks 3 to 7 have a choice.
    assert (layer["queries"], layer["queries_with_choice"]) == (256, 160)
    assert [choice["choice"] for choice in layer["choices"]] == ["B=16 K=3", "B=16 K=6"]
    own, doubled = layer["choices"]
    for head in range(4):
        assert own["nearest"][head] <= own["best"][head] + 1e-6
        assert own["held"][head] <= own["best"][head] + 1e-6 and own["best"][head] <= doubled["best"][head] + 1e-6
    assert record["mass_held"] == pytest.approx(sum(sum(part["choices"][0]["held"]) for part in record["layers"]) / 12)
    for number in (1, 2, 3):
        assert (run / f"plots/routing_step_4_moba_layer_{number}.png").stat().st_size > 1000
    line = [line for line in read_json_lines(run / "evaluations.jsonl") if line.get("kind") == "routing"][-1]
    assert line["mass_held"] == record["mass_held"] and "layers" not in line
    assert line["file"] == "routing_step_4_moba.json"


def test_what_moba_would_hold_of_full_attention(run):
    """Every layer of a model that attends fully, also those that are always full."""
    output = call("evaluate", run, "--attention", "full", "--routing-choice", "8:6", "--routing-samples", 1)
    assert "layers 1, 2, 3, 4 (B=8 K=6): the chosen blocks hold" in output
    record = json.loads((run / "evaluation/routing_step_8_full_B8_K6.json").read_text())
    assert (record["attention"], len(record["layers"])) == ("full", 4)
    assert record["choice"] == "B=8 K=6"
    # K x B = 48 of 128 tokens and a perfect choice: less than everything, more than nothing.
    assert 0.3 < record["mass_held"] <= record["mass_best"] < 1


def test_losses_under_sizes_that_are_not_the_models_own(run):
    choices = [part for text in ("16:3", "16:8", "16:3:recent") for part in ("--losses-choice", text)]
    output = call("evaluate", run, "--attention", "full", "--samples", 2, *choices)
    assert "full attention" in output and "moba B=16 K=3 recent" in output and "minus full" in output
    names = ("step_8", "step_8_B16_K3", "step_8_B16_K8", "step_8_B16_K3_recent")
    full, three, eight, nearest = (json.loads((run / f"evaluation/{name}.json").read_text()) for name in names)
    assert [record.get("choice") for record in (full, three, eight)] == [None, "B=16 K=3", "B=16 K=8"]
    # Eight blocks are all there is; three are less, and which ones matters. The last layer is MoBA here as well.
    assert eight["loss"] == pytest.approx(full["loss"], rel=1e-6)
    assert len({round(record["loss"], 5) for record in (full, three, nearest)}) == 3
    first = slice(0, 2)  # positions up to 31, which three blocks hold
    losses = [[part["loss"] for part in record["by_position_log"][first]] for record in (full, three)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_losses_of_some_layers_and_another_length(run):
    """A layer, ranges of layers; samples of half the run's length have a record of their own."""
    asked = ("--attention", "full", "--samples", 2, "--losses-choice", "16:2@1", "--losses-choice", "16:2@0-1,2,3")
    call("evaluate", run, *asked)
    names = ("step_8", "step_8_B16_K2_in_layers_1", "step_8_B16_K2_in_layers_0-1_2_3")
    full, one, every = (json.loads((run / f"evaluation/{name}.json").read_text()) for name in names)
    assert len({round(record["loss"], 6) for record in (full, one, every)}) == 3
    call("evaluate", run, *asked[:4], "--sequence-length", 64)
    short = json.loads((run / "evaluation/step_8_L64.json").read_text())
    assert (short["choice"], short["by_position_1k"][-1]["end"]) == ("L=64", 64)
    assert 0 < short["evaluated_tokens"] <= 2 * 64 < full["evaluated_tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--losses-choice", "16:3:best"], "choose one of top_k, recent"),
        (["--losses-choice", "256:3"], "longer than the 128 tokens of a sample"),
        (["--losses-choice", "16:3@4"], "the model's layers are 0 to 3"),
        (["--losses-choice", "16:3@2-1"], "after @ come layers"),
        (["--sequence-length", "2k"], "'2k' is not a number of tokens"),
        (["--tasks", "needle", "--sequence-length", "64"], "without the losses or --routing"),
        (["--routing-choice", "8x6"], "such as 512:3"),
        (["--suggest-budget", "0.9"], "--suggest-budget 0.9 without --routing"),
        (["--routing", "--suggest-budget", "0"], "--suggest-budget 0: a share of attention's mass above 0 and up to 1"),
        (["--routing", "--suggest-budget", "90"], "--suggest-budget 90: a share"),
        (["--attention", "dense"], "moba, full or both"),
        (["--trailing", "129"], "1 to the 128 of a sample"),
        (["--samples", "100000"], "evaluation.samples"),
        (["--validation", "nowhere"], "nowhere"),
        (["--routing", "--attention", "full"], "full attention chooses no blocks"),
    ],
)
def test_mistakes_are_named_before_the_work(run, options, message):
    assert message in call("evaluate", run, *options, code=2)


def test_a_run_that_trains_on_forgets_what_was_evaluated_after_its_step(tmp_path):
    config = small_config(tmp_path, training__stop_after=4, checkpoint__every=2)
    run_ranks(1, train_here, config)
    folder = Path(config.run.dir)
    with EvaluationRecords(RunFolder(folder), config) as records:
        for step in (2, 4):
            summary = {"accuracy": step / 4}
            records.write("tasks", step=step, tokens=step * 512, attention="moba", values=summary, summary=summary)
    shutil.rmtree(folder / "checkpoints/step_4")
    run_ranks(1, train_here, small_config(tmp_path, training__steps=8))
    lines = read_metrics(folder, "evaluations.jsonl")
    assert [(line.get("kind"), line["step"]) for line in lines] == [("tasks", 2), (None, 8)]


def test_a_line_is_added_after_what_a_kill_has_left(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    append_json_line(path, {"step": 3})
    append_json_line(path, {"step": 4})
    assert [line["step"] for line in read_json_lines(path)] == [1, 3, 4]


def test_a_layer_is_captured_only_without_gradients():
    seen = []
    core = _core(LayerAttention("moba", 4, 2))
    q, k = torch.randn(16, 1, 4, 8), torch.randn(16, 1, 2, 8)
    with torch.no_grad():
        before = core(q, k, k, None)
        with capture_attention([core], seen.append):
            during = core(q, k, k, None)
        core(q, k, k, None)
    assert torch.equal(before, during) and len(seen) == 1
    assert seen[0].q.shape == (16, 4, 8) and seen[0].k.shape == (16, 2, 8) and seen[0].cu_seqlens is None
    with capture_attention([core], seen.append), pytest.raises(ValueError, match="no_grad"):
        core(q, k, k, None)


def _core(attention):
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.0)
    return MoBACoreAttention(config, 1, AttnMaskType.causal, "self", attention=attention)


def test_the_page_of_a_run_stands_alone(run):
    call("report", run)
    page = (run / "report.html").read_text()
    assert "finished after step 8 of 8" in page and "block_size: 16" in page and "megatron-core" in page
    assert len(re.findall(r'src="data:image/png;base64,', page)) >= 2
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    call("report", run)


def test_runs_side_by_side_and_runs_that_are_not_done(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("top_k: 3", "top_k: 2"))
    (other / "status.json").write_text(json.dumps({"state": "failed", "step": None, "error": "no <disk>"}))
    page = report_page([view_run(run), view_run(other)])
    assert "failed after step 0 of 8: no &lt;disk&gt;" in page and "What differs" in page
    differences = page.split("What differs")[1].split("<h2>")[0]
    assert "attention.top_k" in differences and "attention.block_size" not in differences
    alone = report_page([view_run(other)])
    assert "No step has been taken yet" in alone and "No evaluation yet" in alone


def test_the_page_of_a_mixture_shows_the_load_of_its_experts(run, tmp_path):
    experts = {"model__num_moe_experts": 4, "model__moe_ffn_hidden_size": 16, "model__moe_layer_freq": [0, 1, 1, 0]}
    config = small_config(tmp_path, **experts, training__steps=3, model__moe_aux_loss_coeff=0.01)
    run_ranks(1, train_here, config)
    view = view_run(Path(config.run.dir))
    assert [[layer["layer"] for layer in step["experts"]] for step in view.steps] == [[2, 3]] * 3
    view.name = "mixture"
    page = report_page([view, view_run(run)])
    assert page.count('alt="load of the experts of mixture"') == page.count("load of the experts") == 1


def test_the_page_shows_a_models_own_routing_and_the_newest_of_every_task(tmp_path):
    """Looking at other sizes or tasks later takes nothing off the page. A name is not a formula, whatever is in it."""
    folder = tmp_path / "a$x_$b"
    folder.mkdir()
    steps = [{"step": n, "tokens": n, "loss": 3.0, "lr": 0.1, "grad_norm": 1.0, "stage": 0} for n in (1, 2)]
    lines = (json.dumps({**step, "step_seconds": 1.0, "tokens_per_second": 1.0}) + "\n" for step in steps)
    (folder / "metrics.jsonl").write_text("".join(lines))
    records = EvaluationRecords(RunFolder(folder))
    head = {"step": 5, "tokens": 9, "attention": "moba"}
    for advice, more in (("supposed", {"choice": "B=8 K=6"}), ("its own", {}), ("supposed", {"choice": "B=8 K=6"})):
        summary = {"mass_held": 0.5, **more}
        records.write("routing", **head, values={"layers": [], "advice": [advice]}, summary=summary, name=advice)
        if advice == "supposed":
            supposed = "step 5, if it chose B=8 K=6</h3>" in report_page([view_run(folder)])
            assert supposed == (len(view_run(folder).evaluations) == 1)
    for task, score in (("needle", 0.25), ("multi_key", 0.5), ("multi_key", 0.75)):
        records.write("tasks", **head, values={}, summary={f"{task}_128_greedy_match": score})
    other = shutil.copytree(folder, tmp_path / "c")
    page = report_page([view_run(folder), view_run(other)])
    assert "its own" in page and "supposed" not in page and "if it chose" not in page
    for row in ("needle_128_greedy_match</td><td>0.25", "multi_key_128_greedy_match</td><td>0.75"):
        assert page.count(row) == 2


def test_report_refuses_what_is_no_run_or_no_report(run, tmp_path):
    assert "not a run folder" in call("report", tmp_path, code=2)
    assert "the same run twice" in call("report", run, run / ".", code=2)
    mine = tmp_path / "mine.html"
    mine.write_text("<html>not made here</html>")
    assert "is not a report" in call("report", run, "--output", mine, code=2)
    assert mine.read_text() == "<html>not made here</html>"
