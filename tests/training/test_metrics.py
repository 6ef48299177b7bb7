"""The records of a run: cut back on resume, whole after a kill in the middle of a line."""

from __future__ import annotations

import json

from moba_megatron.runs.metrics import JsonLines, read_json_lines


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
    JsonLines(path, keep_steps=3).close()
    assert path.read_text().count("\n") == 3 and path.read_text().endswith("\n")


def test_a_new_file_starts_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    JsonLines(path, keep_steps=0).close()
    assert path.read_text() == ""
