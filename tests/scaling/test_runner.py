"""A sweep that really runs: skips what is done, continues what was cut, shows what failed."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from scaling.sweep_examples import write_sweep
from small_run import read_metrics
from typer.testing import CliRunner

from moba_megatron.config import ConfigError, load_config
from moba_megatron.scaling.laws import fit_sweep, left_out
from moba_megatron.scaling.results import ENDED, LOG, read_results
from moba_megatron.scaling.runner import run_sweep
from moba_megatron.scaling.scaling_command import scaling_app
from moba_megatron.scaling.sweep import load_sweep

ARRAY = Path(__file__).parents[2] / "launch/sweep.sbatch"
FIGURES = [{"kind": "scaling"}, {"kind": "options", "axis": "size"}, {"kind": "positions"}, {"kind": "curves"}]
AXES = {
    "size": {
        "one": {"model.num_layers": 1, "attention.last_n_full": 0},
        "two": {"model.num_layers": 2},
        "broken": {"model.num_layers": 4, "data.train": "no/such/data"},
    },
    "attention": {"moba": {}},
}


def test_a_sweep_from_plan_to_figures(tmp_path):
    path = write_sweep(tmp_path, axes=AXES, figures=FIGURES)
    sweep = load_sweep(path)
    assert [result.state for result in read_results(sweep)] == ["missing"] * 3
    results = run_sweep(sweep, sweep.points, jobs=2)
    assert [result.state for result in results] == ["finished", "finished", "failed"]
    assert "no/such/data" in results[2].why
    assert results[0].loss > 0 and results[0].step == 8 and len(results[0].by_position) == 16

    before = (sweep.points[0].folder / "metrics.jsonl").stat().st_mtime_ns
    again = run_sweep(sweep, sweep.points[:2], jobs=2)
    assert [result.loss for result in again] == [result.loss for result in results[:2]]
    assert (sweep.points[0].folder / "metrics.jsonl").stat().st_mtime_ns == before

    assert left_out(results, "loss") == [f"broken_moba: failed: {results[2].why}"]
    (law,) = fit_sweep(sweep, results, "attention", "loss")
    assert law.by_6nd is None and "three amounts" in law.problems[0]
    _show(path, sweep)
    _other_settings_are_refused(path, sweep)


def _show(path, sweep):
    """The commands say the same, failed run included."""
    for command in ("plan", "table", "fit", "plot"):
        done = CliRunner().invoke(scaling_app, [command, str(path)])
        assert done.exit_code == 0, done.output
        assert "broken" in done.output and "failed" in done.output
    assert len(list(sweep.folder.glob("*.png"))) == len(FIGURES)
    assert "broken_moba: failed" in json.loads((sweep.folder / "laws.json").read_text())["left_out"][0]
    array = CliRunner().invoke(scaling_app, ["run", str(path), "--slurm", str(ARRAY)]).output
    assert f"--array=2 {ARRAY} {path}" in array.replace("\n", " ")
    only = CliRunner().invoke(scaling_app, ["run", str(path), "--only", "0", "--slurm", str(ARRAY)]).output
    assert only.split()[-1] == "true"


def _other_settings_are_refused(path, sweep):
    values = yaml.safe_load(path.read_text())
    values["axes"]["size"]["one"]["attention.block_size"] = 32
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(ConfigError, match=r"attention.block_size = 32 \(the run has 16\)"):
        read_results(load_sweep(path))


def test_a_run_that_was_cut_goes_on(tmp_path):
    axes = {"attention": {"moba": {"training.steps": 100, "model.num_layers": 1, "attention.last_n_full": 0}}}
    sweep = load_sweep(write_sweep(tmp_path, axes=axes, figures=[{"kind": "curves"}]))
    (nothing,) = run_sweep(sweep, sweep.points, jobs=1, minutes=0)
    assert nothing.state == "missing"
    metrics = sweep.points[0].folder / "metrics.jsonl"

    def interrupt():
        while not (metrics.is_file() and metrics.read_text().count("\n") > 5):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell's background job starts with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, sweep.points, jobs=1)
    signal.signal(signal.SIGINT, before)
    (result,) = read_results(sweep)
    assert result.state == "cut" and 5 < result.step < 100 and result.loss is None
    lines = read_metrics(metrics.parent)
    _a_refused_continuation_has_failed(sweep)
    (later,) = run_sweep(sweep, sweep.points, jobs=1)
    assert later.state == "finished" and later.step == 100
    assert read_metrics(metrics.parent)[: len(lines)] == lines
    assert load_config(metrics.parent / "config.yaml").run.threads == 1, "the base's, not all cores"
    _evaluations_without_time_are_named(tmp_path, axes)


def _evaluations_without_time_are_named(folder, axes):
    sweep = load_sweep(write_sweep(folder, axes=axes, figures=[{"kind": "curves"}], evaluate=["--routing"]))
    said = io.StringIO()
    run_sweep(sweep, sweep.points, jobs=1, minutes=0, console=Console(file=said, width=200))
    assert "not evaluated yet: moba; run the same command again" in said.getvalue()


def _a_refused_continuation_has_failed(sweep):
    """A process that ends before its first step leaves the status of the one before; its last words count."""
    log = sweep.points[0].folder / LOG
    before = log.read_text()
    for code, state in ((2, "failed"), (-11, "failed"), (-15, "cut"), (137, "cut"), (0, "cut")):
        log.write_text(f"{before}error: the data moved\n\n{ENDED}{code}\n")
        (result,) = read_results(sweep)
        assert (result.state, result.why) == (state, "error: the data moved" if state == "failed" else "")
    log.write_text(f"{before}\n{ENDED}2\ntrain.py again\n")
    assert read_results(sweep)[0].state == "cut"
    log.write_text(before)


def test_a_run_of_several_ranks_saves_when_the_time_is_up(tmp_path):
    axes = {"attention": {"moba": {"training.steps": 5000, "model.num_layers": 1, "attention.last_n_full": 0}}}
    sweep = load_sweep(write_sweep(tmp_path, axes=axes, figures=[]))
    (result,) = run_sweep(sweep, sweep.points, jobs=1, processes=2, minutes=1 / 60)
    assert result.state == "cut" and 1 <= result.step < 5000
    (checkpoint,) = (result.point.folder / "checkpoints").iterdir()
    assert checkpoint.name == f"step_{result.step}"


def test_a_run_waits_for_the_one_it_starts_from(tmp_path):
    axes = {"stage": {"short": {}, "long": {"start_from": "short", "data.sequence_length": 256}}}
    path = write_sweep(tmp_path, axes=axes, figures=[{"kind": "curves"}])
    sweep = load_sweep(path)
    with pytest.raises(ConfigError, match="long starts from short, which has not finished"):
        run_sweep(sweep, sweep.points[1:], jobs=1)
    array = CliRunner().invoke(scaling_app, ["run", str(path), "--slurm", str(ARRAY)])
    assert array.exit_code == 2 and "an array's tasks do not wait" in array.output
    assert [result.state for result in run_sweep(sweep, sweep.points, jobs=2)] == ["finished"] * 2
    short, long = (read_metrics(point.folder) for point in sweep.points)
    assert long[0]["loss"] < (short[0]["loss"] + short[-1]["loss"]) / 2
