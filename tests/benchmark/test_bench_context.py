"""`moba-megatron bench --context-parallel` starts its own processes, measures every exchange and writes what it saw."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys

from typer.testing import CliRunner

from moba_megatron.benchmark.inputs import chosen_inputs, counted_ring_factor, past_choices
from moba_megatron.cli import app

SIZES = ["--lengths", "512", "--blocks", "16:3", "--dtypes", "fp32", "--heads", "4", "--groups", "2", "--runs", "1"]


def bench(folder, *options: str):
    return CliRunner().invoke(app, ["bench", *SIZES, "--output", str(folder), "--threads", "1", *options])


def test_every_exchange_is_measured(tmp_path):
    result = bench(tmp_path, "--context-parallel", "2", "--inputs", "sink")
    assert result.exit_code == 0, result.output
    with open(tmp_path / "context.csv") as file:
        rows = {(row["exchange"], row["block_size"]): row for row in csv.DictReader(file)}
    assert {name for name, block in rows if block} == {"p2p", "all_gather", "a2a", "dispatch"}
    assert {name for name, block in rows if not block} == {"p2p", "all_gather", "a2a"}
    for (name, block), row in rows.items():
        received = int(row["forward_bytes"]) + int(row["backward_bytes"])
        # 32 blocks, all of them whole on one rank: 16 summaries of two heads of 64 in fp32.
        summaries = 16 * 2 * 64 * 4 if block and name != "a2a" else 0
        if name != "dispatch":
            assert received - summaries == int(row["formula_bytes"])
        assert float(row["forward_seconds"]) > 0 and float(row["backward_seconds"]) > 0
    assert 0 < float(rows["p2p", "16"]["selected"]) <= 1
    # A ring waits for the ranks that hold the first block's queries.
    q, k, _ = chosen_inputs("sink", 512, 4, 2, 64, "fp32", "cpu", 0, 16)
    ring = counted_ring_factor(past_choices(q, k, 16, 3), 4, 512, 16, 2)
    assert rows["p2p", "16"]["load"] == f"{ring:.2f} in steps" and ring > 1.2
    assert rows["a2a", "16"]["load"] == rows["p2p", ""]["load"] == ""
    assert (tmp_path / "context.md").exists() and (tmp_path / "context.png").stat().st_size > 1000


def test_a_length_that_does_not_fit(tmp_path):
    result = bench(tmp_path, "--context-parallel", "3")
    assert result.exit_code == 2
    assert "512 tokens are not a multiple of 2 x context-parallel size = 6: use 516" in result.output


def test_an_exchange_that_is_wrong_ends_with_one(tmp_path):
    """And is not timed: here none is good enough."""
    code = (
        "import os, sys; from moba_megatron.benchmark import exchanges; exchanges.AGREEMENT['fp32'] = -1.0; "
        "from moba_megatron.cli import app; app(sys.argv[1:])"
    )
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world["MASTER_PORT"] = str(free.getsockname()[1])
    command = [sys.executable, "-c", code, "bench", *SIZES, "--output", tmp_path, "--context-parallel", "1"]
    done = subprocess.run(command, env=os.environ | world, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "left out: p2p differs from one rank by" in done.stdout
