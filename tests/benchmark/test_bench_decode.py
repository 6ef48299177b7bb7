"""The benchmark of decoding measures what it says, at a size of a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moba_megatron.benchmark.decoding import DecodeSettings, measure
from moba_megatron.cli import app


def test_every_length_is_measured():
    settings = DecodeSettings(lengths=(64, 200), prefill_up_to=64, block_size=16, layers=1, head_size=8, runs=1)
    rows = list(measure(settings))
    assert [row.tokens for row in rows] == [64, 200]
    assert all(row.step_full > 0 and row.step_moba > 0 and row.step_moba_dynamic_cache > 0 for row in rows)
    assert rows[0].prefill_moba > 0 and rows[1].prefill_full is None
    assert torch.is_grad_enabled()


def bench(output: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bench", "--decode", "--device", "cpu", "--output", str(output), *options])
    return done.exit_code, done.output


def test_the_command_writes_what_it_prints(tmp_path):
    code, said = bench(tmp_path, "--lengths", "64,128", "--blocks", "16:3", "--runs", "1", "--threads", "1")
    assert code == 0, said
    assert "step moba" in said
    assert (tmp_path / "decode.md").read_text().count("\n") == 4
    lines = (tmp_path / "decode.csv").read_text().splitlines()
    assert lines[0].startswith("tokens,step_full") and [line.split(",")[0] for line in lines[1:]] == ["64", "128"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "16:3,32:3"], "one pair of block size and top-k"),
        (["--device", "cuda"], "CPU alone"),
        (["--heads", "3", "--groups", "2"], "3 query heads are no multiple of 2 key heads"),
        (["--dtypes", "bf16"], "leave out --dtypes"),
        (["--preset", "targets", "--modes", "fwd"], "leave out --modes, --preset"),
        (["--backend", "gathered", "--full", "torch"], "leave out --backend, --full"),
        (["--context-parallel", "2"], "leave out --context-parallel"),
        (["--model"], "leave out --model"),
        (["--tune"], "leave out --tune"),
    ],
)
def test_what_it_cannot_measure_is_refused(tmp_path, options, message):
    code, said = bench(tmp_path, *options)
    assert code == 2 and message in said
