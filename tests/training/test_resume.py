"""A run that is stopped and resumed equals the unbroken one bit for bit."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from small_run import numbers_of, read_metrics, small_config, train_here

from moba_megatron.checkpoint import Manifest, list_checkpoints
from moba_megatron.config import ConfigError, load_config
from moba_megatron.evaluation.report.run_page import report_page
from moba_megatron.evaluation.report.run_view import view_run
from moba_megatron.runs.claim import check_shared, claimed
from moba_megatron.runs.folder import RunFolder
from moba_megatron.runs.starts import layout_changes
from moba_megatron.training.preflight import preflight

HALVES = {"attention__stages": [{"until": 0.5}, {"until": 1.0, "kind": "full"}]}


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, weights and optimizer state, read without any model."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    shapes = {name: m for name, m in metadata.items() if hasattr(m, "size")}
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in shapes.items()}
    load(tensors, checkpoint_id=str(checkpoint), no_dist=True)
    return tensors


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {"training__precision": "fp32", **HALVES}),
        (1, {"training__precision": "bf16", "data__cross_document_attention": True, "checkpoint__asynchronous": False}),
        (
            2,
            {
                "parallel__distributed_optimizer": True,
                "parallel__overlap_grad_reduce": True,
                "training__precision": "bf16",
                **HALVES,
            },
        ),
        pytest.param(
            2,
            {
                "parallel__distributed_optimizer": True,
                "parallel__pipeline": 2,
                "parallel__virtual_pipeline": 2,
                "model__share_embeddings_and_output_weights": True,
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(2, {"parallel__tensor": 2, "parallel__sequence": True}, marks=pytest.mark.slow),
    ],
    ids=["fp32-stages", "bf16-synchronous", "distributed-optimizer", "interleaved-pipeline", "tensor-sequence"],
)
def test_stopped_and_resumed_equals_unbroken(tmp_path, small_buckets, ranks, changes):
    changes = {"checkpoint__every": 3, "evaluation__every": 3, **changes}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = small_config(tmp_path / "a", **changes)
    parts = small_config(tmp_path / "b", **changes)
    # It may come and go. (With the distributed optimizer another layout of buckets rounds gradient norms otherwise.)
    settings = {"training": {"stop_after": 4}, "parallel": {"overlap_grad_reduce": True}}
    first = parts.model_copy(update={key: getattr(parts, key).model_copy(update=new) for key, new in settings.items()})
    assert run_ranks(ranks, train_here, whole, ranks) == [("finished", 8)] * ranks
    assert run_ranks(ranks, train_here, first, ranks) == [("paused", 4)] * ranks
    assert run_ranks(ranks, train_here, parts, ranks) == [("finished", 8)] * ranks
    here, there = Path(whole.run.dir), Path(parts.run.dir)
    assert numbers_of(read_metrics(here)) == numbers_of(read_metrics(there))
    assert read_metrics(here, "evaluations.jsonl") == read_metrics(there, "evaluations.jsonl")
    seen = [(line["step"], line["tokens"]) for line in read_metrics(there, "evaluations.jsonl")]
    assert seen == [(step, step * whole.tokens_per_step) for step in (3, 6, 8)]
    assert [p.name for p in list_checkpoints(there / "checkpoints")] == ["step_6", "step_8"]
    one, two = (weights_of(folder / "checkpoints/step_8") for folder in (here, there))
    assert one.keys() == two.keys() and len(one) >= 24
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_goes_on_at_another_parallel_layout(tmp_path):
    whole = small_config(tmp_path / "a")
    run_ranks(1, train_here, whole)
    changes = {"parallel__tensor": 2, "parallel__sequence": True, "training__stop_after": 4}
    run_ranks(2, train_here, small_config(tmp_path / "b", **changes), 2)
    run_ranks(1, train_here, small_config(tmp_path / "b"))
    one, two = (read_metrics(folder / "run") for folder in (tmp_path / "a", tmp_path / "b"))
    page = report_page([view_run(tmp_path / "b/run")])
    assert "from step 5 on</td><td>processes: 2 -&gt; 1, parallel.tensor: 2 -&gt; 1, parallel.sequence: True" in page
    assert "Changes of the layout" not in report_page([view_run(tmp_path / "a/run")])
    (tmp_path / "b/run/starts.jsonl").unlink()
    assert layout_changes(RunFolder(tmp_path / "b/run")) == [
        (4, {"parallel.tensor": (2, 1), "parallel.sequence": (True, False)})
    ]
    # The same weights at first, and so the same course.
    assert [line["step"] for line in two] == [line["step"] for line in one]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)


def test_a_finished_run_started_again_says_so_and_changes_nothing(tmp_path):
    config = small_config(tmp_path, training__steps=3)
    run_ranks(1, train_here, config)
    before = (Path(config.run.dir) / "metrics.jsonl").read_bytes()
    assert run_ranks(1, train_here, config) == [("finished", 3)]
    assert (Path(config.run.dir) / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_is_made_up_for(tmp_path, ranks):
    """Killed between a checkpoint and the evaluation after the same step, in the middle and at the end."""
    config = small_config(tmp_path, training__steps=3, evaluation__every=2, **HALVES)
    path, steps = Path(config.run.dir) / "evaluations.jsonl", Path(config.run.dir) / "metrics.jsonl"
    paused = config.model_copy(update={"training": config.training.model_copy(update={"stop_after": 2})})
    run_ranks(ranks, train_here, paused, ranks)
    first = path.read_bytes()
    path.unlink()
    assert run_ranks(ranks, train_here, config, ranks) == [("finished", 3)] * ranks
    before, metrics = path.read_bytes(), steps.read_bytes()
    assert before.startswith(first) and before.count(b"\n") == 2
    path.write_bytes(first)
    assert run_ranks(ranks, train_here, config, ranks) == [("finished", 3)] * ranks
    assert (path.read_bytes(), steps.read_bytes()) == (before, metrics)


def test_a_setting_younger_than_the_checkpoint_is_at_its_default(paused, tmp_path):
    shutil.copytree(paused / "run", tmp_path / "run")
    manifest = tmp_path / "run/checkpoints/step_2/checkpoint.json"
    values = json.loads(manifest.read_text())
    del values["config"]["model"]["rotary_low_freq_factor"], values["blake2b"]
    manifest.write_text(json.dumps(values))
    run = {"run__dir": str(tmp_path / "run")}
    assert preflight(small_config(paused, **run), 1).resume.name == "step_2"
    with pytest.raises(ConfigError, match="rotary_low_freq_factor = 2.0, but the run has 1.0"):
        preflight(small_config(paused, **run, model__rotary_low_freq_factor=2.0), 1)


def test_a_configuration_that_left_no_step_hides_none_that_did(tmp_path):
    folder = RunFolder(tmp_path)
    first, second, third = (small_config(tmp_path, run__seed=seed) for seed in (1, 2, 3))
    folder.write_config(first, 0, [])
    for config in (second, third):
        folder.write_config(config, 100, [])
    kept = load_config(tmp_path / "config.until_step_100.yaml")
    assert (kept.run.seed, load_config(folder.config).run.seed) == (1, 3)


def test_ranks_that_do_not_see_the_run_folder_end_the_run_before_its_first_step(tmp_path):
    def look() -> str:
        own = torch.distributed.get_rank() == 0
        try:
            with claimed(tmp_path / "here") if own else nullcontext() as claim:
                check_shared(tmp_path / "here", claim, patience=1)
                check_shared(tmp_path / ("here" if own else "there"), claim, patience=0)
        except ConfigError as error:
            return str(error)
        return "seen"

    here, there = run_ranks(2, look)
    assert here.replace("/here", "/there") == there and "here (claimed by process" in here
    assert "is not seen on" in here and "a disk that all machines share" in here


@pytest.fixture(scope="module")
def paused(tmp_path_factory):
    """A folder with a run paused after step 2, and its configuration's changes."""
    folder = tmp_path_factory.mktemp("paused")
    config = small_config(folder, training__stop_after=2)
    run_ranks(1, train_here, config)
    return folder


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention__top_k": 2}, "attention: stage 1, layer 1: moba B=16 K=2 against moba B=16 K=3"),
        ({"attention__stages": HALVES["attention__stages"]}, "attention: stages end at [0.5, 1.0]"),
        ({"training__steps": 9}, "training.steps = 9, but the run has 8"),
        ({"run__seed": 1}, "run.seed = 1"),
        ({"model__rotary_base": 5e5}, "model.rotary_base"),
        ({"checkpoint__resume": "never"}, "already holds a run"),
        ({"checkpoint__resume": "nowhere"}, "no complete checkpoint"),
    ],
)
def test_a_resume_with_other_settings_is_refused(paused, changes, expected):
    with pytest.raises(ConfigError) as error:
        preflight(small_config(paused, **changes), 1)
    assert expected in str(error.value)


def test_what_is_asked_for_by_name_may_change(paused):
    allowed = {"checkpoint__allow_changed": ["attention", "training.steps"]}
    config = small_config(paused, attention__top_k=2, training__steps=9, **allowed)
    assert preflight(config, 1).resume.name == "step_2"


def test_a_schedule_said_in_other_words_is_the_same(paused):
    config = small_config(paused, attention__last_n_full=0, attention__full_layers=[4])
    assert preflight(config, 1).resume.name == "step_2"


def test_data_made_anew_at_the_same_place_is_noticed(paused, tmp_path):
    shutil.copytree(paused, tmp_path / "copy")
    config = small_config(tmp_path / "copy", run__dir=str(paused / "run"))
    shutil.copy(tmp_path / "copy/tokens/validation.bin", tmp_path / "copy/tokens/train.bin")
    shutil.copy(tmp_path / "copy/tokens/validation.idx", tmp_path / "copy/tokens/train.idx")
    moved = {"checkpoint__allow_changed": ["data.tokenizer"]}
    with pytest.raises(ConfigError, match="data.train: the files or their shares differ"):
        preflight(small_config(tmp_path / "copy", run__dir=config.run.dir, **moved), 1)


def test_a_named_checkpoint_starts_a_run_that_then_goes_its_own_way(paused, tmp_path):
    named = paused / "run/checkpoints/step_2"
    config = small_config(
        tmp_path, checkpoint__resume=str(named), checkpoint__allow_changed=["data"], checkpoint__every=1
    )
    assert preflight(config, 1).resume == named
    stopped = config.model_copy(update={"training": config.training.model_copy(update={"stop_after": 4})})
    assert run_ranks(1, train_here, stopped) == [("paused", 4)]
    assert preflight(config, 1).resume.name == "step_4"
    back = small_config(tmp_path, checkpoint__resume=str(Path(config.run.dir) / "checkpoints/step_3"))
    with pytest.raises(ConfigError, match="to go back, choose another run.dir"):
        preflight(back, 1)


def test_layout_and_logging_may_change_freely(paused):
    config = small_config(paused, training__micro_batch_size=1, logging__every=5, training__recompute="full")
    assert preflight(config, 1).resume.name == "step_2"


def test_what_a_younger_version_knows_of_the_model_is_no_difference(paused, tmp_path):
    """The window of the model that a run started from, and a default that was once a number."""
    shutil.copytree(paused, tmp_path / "copy")
    (checkpoint,) = list_checkpoints(tmp_path / "copy/run/checkpoints")
    manifest = Manifest.read(checkpoint)
    model = {key: value for key, value in manifest.config["model"].items() if key != "max_position_embeddings"}
    replace(manifest, config={**manifest.config, "model": {**model, "rotary_attention_factor": 1.0}}).write(checkpoint)
    moved = {"checkpoint__allow_changed": ["data"]}
    config = small_config(tmp_path / "copy", model__max_position_embeddings=4096, **moved)
    assert preflight(config, 1).resume == checkpoint


def test_status_and_history_tell_how_a_run_went(tmp_path):
    config = small_config(tmp_path, training__stop_after=2)
    run_ranks(1, train_here, config)
    folder = RunFolder(config.run.dir)
    assert json.loads(folder.status.read_text())["state"] == "paused"
    assert "attention.backend = auto: gathered" in folder.config.read_text()
    run_ranks(1, train_here, small_config(tmp_path, logging__every=2))
    assert json.loads(folder.status.read_text())["state"] == "finished"
    assert (folder.path / "config.until_step_2.yaml").is_file()


def test_the_checkpoint_is_chosen_again_once_the_folder_is_ours(tmp_path):
    """Another process may train between the choice and the claim: what it left is gone on from, not trained anew."""
    config = small_config(tmp_path, training__steps=4)
    chosen_before = preflight(config, 1)
    assert chosen_before.resume is None
    paused = config.model_copy(update={"training": config.training.model_copy(update={"stop_after": 2})})
    run_ranks(1, train_here, paused)

    def go_on():
        from moba_megatron.training.run import train

        outcome = train(config, chosen_before)
        return outcome.state, outcome.step

    assert run_ranks(1, go_on) == [("finished", 4)]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
