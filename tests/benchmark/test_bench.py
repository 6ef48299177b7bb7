"""The operator benchmark on tiny settings: files, refusal, formula, crossover."""

import csv
import importlib.machinery
import importlib.util
import io
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from triton.errors import TritonError
from typer.testing import CliRunner

import moba_megatron.benchmark.operator as bench
from moba_megatron.benchmark import agreement
from moba_megatron.benchmark.calls import clear_inputs, median_seconds
from moba_megatron.benchmark.inputs import chosen_inputs, hottest_load
from moba_megatron.benchmark.operator import run_bench
from moba_megatron.benchmark.presets import PRESETS
from moba_megatron.benchmark.settings import BenchResult, BenchRow, BenchSettings, Case, pair_ratio
from moba_megatron.cli import app
from moba_megatron.ops import adapters, select_blocks
from moba_megatron.ops.backends import FULL_BACKENDS
from moba_megatron.ops.gathered import tiles
from moba_megatron.ops.gathered.kv_heads import CAUSAL_ROWS
from moba_megatron.ops.reference import reference_attend
from moba_megatron.planning.flops import attended_pairs

TINY = BenchSettings(lengths=(64, 96), blocks=((16, 2),), dtypes=("fp32",), runs=1, head_size=8)


def test_writes_table_csv_and_plot(tmp_path):
    text = io.StringIO()
    result = run_bench(TINY, tmp_path, console=Console(file=text, width=160))
    assert [(r.length, r.mode) for r in result.rows] == [(64, "fwd"), (96, "fwd"), (64, "fwd+bwd"), (96, "fwd+bwd")]
    assert all(r.moba_seconds > 0 and r.extra_bytes > 0 for r in result.rows)
    rows = list(csv.DictReader(open(tmp_path / "bench.csv")))
    assert float(rows[0]["speedup"]) == result.rows[0].speedup
    assert (tmp_path / "bench.md").read_text().count("\n") == 2 + len(result.rows)
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert "beats full attention" in text.getvalue()


@pytest.mark.parametrize(("kind", "least", "most"), [("sink", 30, 33), ("hot", 6, 33), ("local", 1, 4)])
def test_rows_say_how_often_the_most_chosen_block_is_chosen(tmp_path, kind, least, most):
    """Two past blocks for every query: the first of 64 blocks is chosen 32 times as often as the mean."""
    sizes = "--lengths 2048 --blocks 32:3 --dtypes fp32 --modes fwd --full none --runs 1 --head-size 32"
    result = CliRunner().invoke(app, ["bench", *sizes.split(), "--inputs", kind, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (row,) = csv.DictReader(open(tmp_path / "bench.csv"))
    q, k, _ = chosen_inputs(kind, 2048, 4, 2, 32, "fp32", "cpu", 0, 32)
    assert row["inputs"] == kind and least < float(row["hottest"]) < most
    assert float(row["hottest"]) == pytest.approx(hottest_load(q, k, 32, 3), rel=1e-3)
    heading, _, cells = ([cell.strip() for cell in line.split("|")] for line in open(tmp_path / "bench.md"))
    assert cells[heading.index("hottest")] == f"{float(row['hottest']):.1f}x"


def test_without_full_attention_there_is_no_speedup(tmp_path):
    text = io.StringIO()
    result = run_bench(replace(TINY, full=()), tmp_path, console=Console(file=text, width=160))
    assert all(row.moba_seconds > 0 and row.speedup is None and not row.dense_by for row in result.rows)
    assert result.crossovers() == {} and "beats" not in text.getvalue()
    assert "speed-up" not in (tmp_path / "bench.md").read_text()


def test_the_command_says_nothing_of_its_profiler(tmp_path):
    options = "bench --lengths 64 --blocks 16:2 --dtypes fp32 --modes fwd --runs 1 --head-size 8 --output"
    command = [sys.executable, "-m", "moba_megatron", *options.split(), str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "extra" in done.stdout and "USDT" not in done.stdout + done.stderr


def test_refuses_a_wrong_operator(tmp_path, monkeypatch):
    def wrong(q, k, v, **settings):
        out = bench_moba(q, k, v, **settings)
        return out * 1.01 if settings["backend"] == "gathered" else out

    bench_moba = bench.moba_attention
    monkeypatch.setattr(bench, "moba_attention", wrong)
    result = run_bench(TINY, tmp_path, console=Console(file=io.StringIO()))
    assert result.rows == [] and "out differs" in result.refused[0]


def test_a_kernel_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch):
    def fails_at_first(*arguments):
        monkeypatch.undo()
        raise TritonError("shared memory is out of resource\nhint")

    monkeypatch.setattr(bench, "measure", fails_at_first)
    covered = replace(TINY, lengths=(32, *TINY.lengths))
    result = run_bench(covered, tmp_path, console=Console(file=io.StringIO(), width=200))
    (refused,) = result.refused
    assert refused.endswith("TritonError: shared memory is out of resource") and result.rows
    assert result.full and all("MoBA is full attention there" in line for line in result.full)
    notes = (tmp_path / "bench.md").read_text()
    assert refused in notes and result.full[0] in notes


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("factor", [1.05, 1.2])
def test_refuses_a_small_factor(monkeypatch, dtype, factor):
    right = bench.moba_attention
    assert bench.disagreement(TINY, dtype, 16, 2) is None
    monkeypatch.setattr(bench, "moba_attention", lambda *x, **settings: right(*x, **settings) * factor)
    assert "out differs" in bench.disagreement(TINY, dtype, 16, 2)


def test_refuses_a_broken_mask_in_later_rows_of_a_block(monkeypatch):
    """Only blocks longer than a strip of rows have such rows: the gate must test the real size."""
    right = tiles.matmul_forward

    def wrong(q, k, v, mask=None):
        later = mask is not None and k.shape[1] > CAUSAL_ROWS
        return right(q, k, v, None if later else mask)

    assert bench.disagreement(TINY, "fp32", 256, 2) is None
    monkeypatch.setattr(tiles, "matmul_forward", wrong)
    assert "out differs" in bench.disagreement(TINY, "fp32", 256, 2)


def test_refuses_a_wrong_selection(monkeypatch):
    right = agreement.select_blocks
    monkeypatch.setattr(agreement, "select_blocks", lambda *x, **settings: right(*x, **settings).flip(-1))
    assert "selected blocks differ" in bench.disagreement(TINY, "fp32", 16, 3)


def test_table_is_whole_where_the_output_is_narrow(tmp_path):
    text = io.StringIO()
    run_bench(TINY, tmp_path, console=Console(file=text, width=80))
    heading = next(line for line in text.getvalue().splitlines() if "dtype" in line)
    assert all(name in heading for name in ("pair ratio", "speed-up", "extra / q", "GFLOP/s"))
    assert "of peak" not in heading and "FlashMoBA" not in heading  # nothing to say on a CPU


@pytest.mark.parametrize(("length", "block_size", "top_k"), [(4096, 512, 3), (2048, 16, 8), (1024, 256, 1)])
def test_pair_ratio_counts_pairs(length, block_size, top_k):
    # The formula counts a causal square as half of it, without its diagonal's other half: equal to 1 / block_size.
    exact = attended_pairs(length) / attended_pairs(length, block_size, top_k)
    assert pair_ratio(length, block_size, top_k) == pytest.approx(exact, rel=1 / block_size)


def test_crossover_needs_all_longer_lengths():
    def row(length, speedup, kv_heads=1):
        return BenchRow(
            "fp32",
            2,
            kv_heads,
            length,
            16,
            2,
            "fwd",
            "gathered",
            1.0,
            speedup,
            "torch",
            speedup,
            1.0,
            1.0,
            None,
            0,
            0.0,
        )

    result = BenchResult([row(1, 2.0), row(2, 0.9), row(4, 1.1), row(8, 3.0), row(8, 0.9, kv_heads=2)])
    assert result.crossovers() == {("fp32", 2, 1, 16, 2, "fwd"): 4, ("fp32", 2, 2, 16, 2, "fwd"): None}


def test_bad_settings_name_the_value(tmp_path):
    with pytest.raises(ValueError, match="fp8"):
        BenchSettings(dtypes=("fp8",))
    with pytest.raises(ValueError, match="nonsense"):
        run_bench(TINY, tmp_path, preset="nonsense")


def test_restores_threads(tmp_path):
    before = torch.get_num_threads()
    run_bench(
        BenchSettings(lengths=(32,), blocks=((16, 2),), dtypes=("fp32",), modes=("fwd",), runs=1, threads=1), tmp_path
    )
    assert torch.get_num_threads() == before


def test_a_baseline_that_cannot_run_is_left_out_unless_it_is_the_only_one():
    case = Case("fp32", 64, 16, 2, "fwd+bwd")
    row = bench.measure(replace(TINY, full=("cudnn", "torch")), case)
    assert (row.dense_by, row.backend) == ("torch", "gathered") and row.flash_moba_seconds is None
    pairs = 4 * 64**2 / 2 / pair_ratio(64, 16, 2)
    assert row.attended_flops == pytest.approx(14 * 8 * pairs / row.moba_seconds)
    with pytest.raises(ValueError, match="'cudnn' is not available"):
        bench.measure(replace(TINY, full=("cudnn",)), case)


def test_runs_end_at_the_limit():
    calls = []
    median_seconds({"a": lambda: calls.append(1)}, runs=5, device="cpu", limit=0.0)
    assert len(calls) == 1  # the warm-up counts
    median_seconds({"a": lambda: calls.append(1)}, runs=5, device="cpu", limit=None)
    assert len(calls) == 7


def test_the_gpu_preset_is_the_grid_of_the_targets():
    first, second = PRESETS["gpu"]
    assert len(first["lengths"]) == 8 and first["lengths"][-1] == 2**20 and len(first["blocks"]) == 5
    assert [(part["num_heads"], part["num_kv_heads"]) for part in (first, second)] == [(32, 8), (16, 16)]
    for part in (first, second):
        assert replace(TINY, **part).full == tuple(name for name in FULL_BACKENDS if name != "torch")


def test_clear_inputs_choose_the_same_blocks_with_rounded_means():
    q, k, _ = clear_inputs(300, 4, 2, 16, "bf16", "cpu", 0, 16)
    ids = select_blocks(q, k, block_size=16, top_k=4)[..., 1:]
    assert torch.equal(ids, rounded_choice(q, k, 16, 3))
    assert ids[-1].unique().numel() == 6  # the three highest levels, or the three lowest


def rounded_choice(q, k, block_size, num_past):
    """Past blocks of one document by means in the inputs' dtype."""
    means = torch.stack([block.float().mean(0).to(k.dtype).float() for block in k.split(block_size)])
    scores = torch.einsum("tnd,mnd->tnm", q.float(), means.repeat_interleave(q.shape[1] // k.shape[1], 1))
    own = torch.arange(q.shape[0]) // block_size
    scores = scores.masked_fill(torch.arange(means.shape[0]) >= own.view(-1, 1, 1), -torch.inf)
    best, ids = scores.topk(num_past, dim=-1)
    return ids.masked_fill(best == -torch.inf, -1).to(torch.int32)


@pytest.mark.parametrize("counts_own_block", [True, False])
def test_the_gate_knows_what_flash_moba_counts(monkeypatch, counts_own_block):
    """A stand-in that scores with bf16 means, as the package does: refused if its K leaves out the own block."""

    def flash_moba_varlen_func(q, k, v, *bounds, moba_chunk_size, moba_topk, causal):
        past = moba_topk - counts_own_block
        ids = rounded_choice(q.detach(), k.detach(), moba_chunk_size, past)
        return reference_attend(q, k, v, ids, None, moba_chunk_size, 1 / math.sqrt(q.shape[2]))[0]

    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("flash_moba", None))
    module.flash_moba_varlen_func = flash_moba_varlen_func
    monkeypatch.setitem(sys.modules, "flash_moba", module)
    monkeypatch.setattr(adapters, "_gpu_problem", lambda device, majors: None)
    adapters._import_problem.cache_clear()
    verdict = bench.disagreement(replace(TINY, backend="flash_moba"), "bf16", 64, 3)
    adapters._import_problem.cache_clear()
    assert verdict is None if counts_own_block else "out differs" in verdict


def test_baselines_timed_alone_leave_out_what_fails(monkeypatch):
    settings = replace(TINY, full=("cudnn", "torch"))
    assert set(bench._full_alone(settings, "fp32", 64, "fwd+bwd")) == {"torch"}

    def no_kernel(*arguments):
        raise RuntimeError("No available kernel")

    bench._full_alone.cache_clear()
    monkeypatch.setattr(bench, "full_call", no_kernel)
    with pytest.raises(RuntimeError, match="No available kernel"):
        bench._full_alone(settings, "fp32", 64, "fwd+bwd")
