"""train.py as a user starts it: as a process, under torchrun, stopped by signals, killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from processes import finish, start, wait_for_step
from small_run import numbers_of, read_metrics, small_config

from moba_megatron.checkpoint import find_latest


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Metrics of a run of 60 steps that nothing disturbs."""
    config = small_config(tmp_path_factory.mktemp("unbroken"), training__steps=60, checkpoint__every=5)
    output = finish(start(config))
    return output, read_metrics(Path(config.run.dir))


def test_what_a_run_says(unbroken):
    output, metrics = unbroken
    assert "new run" in output and "stage 1/1 until 100% (steps 1-60)" in output
    assert "layers 1-3: moba B=16 K=3, layer 4: full" in output
    assert "step 60/60  loss" in output and "tokens/s" in output and "left" in output
    assert "validation after step 60" in output and "loss_by_position.png" in output
    assert len(metrics) == 60 and metrics[-1]["loss"] < metrics[0]["loss"] - 0.5


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_saves_ends_with_code_0_and_loses_nothing(unbroken, tmp_path, number):
    config = small_config(tmp_path, training__steps=60, checkpoint__every=50)
    process = start(config)
    wait_for_step(config, 3, process)
    if number == signal.SIGTERM:
        process.send_signal(signal.SIGSTOP)
        output = finish(start(config), code=2)
        assert f"{config.run.dir} is being trained by process {process.pid} on" in output
        process.send_signal(signal.SIGCONT)
    process.send_signal(number)
    output = finish(process)
    status = json.loads((Path(config.run.dir) / "status.json").read_text())
    assert status["state"] == "stopped" and status["signal"] == signal.Signals(number).name and status["step"] < 60
    assert "to continue: the same command" in output
    finish(start(config))
    assert numbers_of(read_metrics(Path(config.run.dir))) == numbers_of(unbroken[1])


def test_a_killed_run_continues_from_its_last_checkpoint(unbroken, tmp_path):
    config = small_config(tmp_path, training__steps=60, checkpoint__every=1)
    for step in (4, 9, 15):
        process = start(config)
        wait_for_step(config, step, process)
        process.kill()
        process.communicate()
        assert find_latest(Path(config.run.dir) / "checkpoints") is not None
    finish(start(config))
    assert numbers_of(read_metrics(Path(config.run.dir))) == numbers_of(unbroken[1])


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {}),
        pytest.param(
            4,
            {"context": 2, "exchange": "dispatch", "distributed_optimizer": True, "overlap_grad_reduce": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dp2", "cp2-dp2"],
)
def test_ranks_under_torchrun_give_the_losses_of_one(unbroken, tmp_path, ranks, parallel):
    changes = {f"parallel__{key}": value for key, value in parallel.items()}
    config = small_config(tmp_path, training__steps=60, checkpoint__every=50, **changes)
    output = finish(start(config, ranks=ranks))
    assert f"{ranks} processes (2 data-parallel)" in output
    metrics = read_metrics(Path(config.run.dir))
    for one, two in zip(unbroken[1], metrics, strict=True):
        # fp32 sums in another order; 60 steps of Adam let the difference grow.
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert metrics[0]["loss"] == pytest.approx(unbroken[1][0]["loss"], rel=1e-6)
    assert json.loads((Path(config.run.dir) / "status.json").read_text())["state"] == "finished"


def test_a_signal_to_torchrun_stops_all_ranks_with_a_checkpoint(tmp_path):
    config = small_config(tmp_path, training__steps=400)
    process = start(config, ranks=2)
    wait_for_step(config, 3, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    status = json.loads((Path(config.run.dir) / "status.json").read_text())
    latest = find_latest(Path(config.run.dir) / "checkpoints")
    assert status["state"] == "stopped" and latest.name == f"step_{status['step']}"


def test_a_run_that_diverges_says_so(tmp_path):
    config = small_config(tmp_path, optimizer__lr=1e30, optimizer__warmup_steps=0, optimizer__clip_grad=0.0)
    output = finish(start(config), code=1)
    assert "TrainingDiverged: step 2: the gradient norm is nan. Lower optimizer.lr" in output
    assert "Traceback" not in output
    assert json.loads((Path(config.run.dir) / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_layer=3", "model.num_layer: unknown key; did you mean model.num_layers"),
        ("data.train=nowhere/train", "nowhere/train"),
        ("attention.backend=triton", "attention.backend = triton"),
    ],
)
def test_a_mistake_ends_before_anything_starts(tmp_path, override, expected):
    config = small_config(tmp_path)
    output = finish(start(config, overrides=(override,)), code=2)
    assert expected in output and "Traceback" not in output
    assert not Path(config.run.dir).exists()


def test_a_dry_run_shows_sizes_and_makes_nothing(tmp_path):
    config = small_config(tmp_path, attention__stages=[{"until": 0.75}, {"until": 1.0, "kind": "full"}])
    output = finish(start(config, overrides=("--dry-run",)))
    for expected in (
        "weights: random, seed 1234",
        "parameters",
        "tokens per step",
        "512",
        "stage 2/2",
        "memory per rank",
        "block_size: 16",
    ):
        assert expected in output
    assert not Path(config.run.dir).exists()
