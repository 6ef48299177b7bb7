"""The records of a run: cut back on resume, whole after a kill in the middle of a line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from distributed import run_ranks
from small_run import small_config, train_here

from moba_megatron.runs.files import last_json_line, read_json_lines
from moba_megatron.runs.folder import RunFolder
from moba_megatron.runs.metrics import JsonLines


def write(path, steps):
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))


def test_lines_after_the_resumed_step_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    lines = JsonLines(path, keep_steps=4)
    lines.write({"step": 5, "loss": 1.0})
    lines.close()
    assert [line["step"] for line in read_json_lines(path)] == [1, 2, 3, 4, 5]


def test_a_line_cut_short_by_a_kill_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    with path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert [line["step"] for line in read_json_lines(path)] == [1, 2, 3]
    assert last_json_line(path) == {"step": 3}
    JsonLines(path, keep_steps=3).close()
    assert path.read_text().count("\n") == 3 and path.read_text().endswith("\n")


def test_the_last_line_of_a_long_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(10_000))
    assert last_json_line(path, needs=("step",)) == {"step": 9_999}
    assert last_json_line(path, needs=("loss",)) is None
    path.write_text("0\n")
    assert last_json_line(path) is None


def test_a_new_file_starts_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == [] and last_json_line(path) is None
    JsonLines(path, keep_steps=0).close()
    assert path.read_text() == ""


def test_what_a_crash_took_from_the_records_is_said_when_the_run_goes_on(tmp_path, capfd):
    """A line of zeros, as a disk shows after the power failed, and lines that never reached it."""
    config = small_config(tmp_path, training__steps=4, training__stop_after=3)
    run_ranks(1, train_here, config)
    path = RunFolder(config.run.dir).metrics
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\0" * (len(second) - 1) + b"\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is damaged"):
        read_json_lines(path)
    whole = config.model_copy(update={"training": config.training.model_copy(update={"stop_after": None})})
    run_ranks(1, train_here, whole)
    said = capfd.readouterr().out
    assert f"{path}: 1 lines were damaged, and are left out" in said
    assert f"{path} lacks steps 2 to 3 of the 3 before: they were trained, and their numbers are lost" in said
    assert [line["step"] for line in read_json_lines(path)] == [1, 4]


def test_damaged_lines_of_other_records_stop_no_run(tmp_path):
    config = small_config(tmp_path, training__steps=4, training__stop_after=2, evaluation__every=2)
    run_ranks(1, train_here, config)
    folder = RunFolder(config.run.dir)
    for path in (folder.evaluations, folder.starts):
        path.write_bytes(b"\0\0\0\n" + path.read_bytes())
    assert folder.evaluated(2)
    config = config.model_copy(update={"training": config.training.model_copy(update={"stop_after": None})})
    assert run_ranks(1, train_here, config) == [("finished", 4)]
    assert len(read_json_lines(folder.starts)) == 2 and folder.evaluated(4)


def test_records_are_on_disk_before_the_checkpoint_that_they_belong_to(tmp_path):
    """As strace would see it: the file is flushed before the checkpoint's name appears."""

    def train() -> list[str]:
        events, fsync, rename = [], os.fsync, Path.rename

        def flushed(handle: int) -> None:
            events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
            fsync(handle)

        def renamed(path: Path, target: Path) -> Path:
            events.append(Path(target).name)
            return rename(path, target)

        os.fsync, Path.rename = flushed, renamed
        train_here(small_config(tmp_path, training__steps=3, training__stop_after=2, checkpoint__every=1))
        return [name for name in events if name.endswith(".jsonl") or name.startswith("step_")]

    (events,) = run_ranks(1, train)
    assert events == ["metrics.jsonl", "evaluations.jsonl", "step_1", "metrics.jsonl", "evaluations.jsonl", "step_2"]


def test_a_plot_that_cannot_be_drawn_does_not_decide_how_a_run_ended(tmp_path):
    config = small_config(tmp_path, training__steps=3)
    folder = RunFolder(config.run.dir)
    (folder.plots / "loss.png").mkdir(parents=True)
    assert run_ranks(1, train_here, config) == [("finished", 3)]
    status = json.loads(folder.status.read_text())
    assert status["state"] == "finished" and "loss.png" in status["plots"]
