"""The operator benchmark on tiny settings: files, refusal, formula, crossover."""

import csv
import io

import pytest
import torch
from rich.console import Console

import moba_megatron.planning.bench as bench
from moba_megatron.ops import tiles
from moba_megatron.ops.passes import ROWS_OF_TRIANGLE
from moba_megatron.planning import agreement
from moba_megatron.planning.bench import BenchResult, BenchRow, BenchSettings, pair_ratio, run_bench
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


def test_refuses_a_wrong_operator(tmp_path, monkeypatch):
    def wrong(q, k, v, **settings):
        out = bench_moba(q, k, v, **settings)
        return out * 1.01 if settings["backend"] == "gathered" else out

    bench_moba = bench.moba_attention
    monkeypatch.setattr(bench, "moba_attention", wrong)
    result = run_bench(TINY, tmp_path, console=Console(file=io.StringIO()))
    assert result.rows == [] and "out differs" in result.refused[0]


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

    def wrong(q, k, v, scale, mask=None):
        later = mask is not None and k.shape[1] > ROWS_OF_TRIANGLE
        return right(q, k, v, scale, None if later else mask)

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
    assert all(name in heading for name in ("pair ratio", "speed-up", "extra / q", "Mpairs/s"))


@pytest.mark.parametrize(("length", "block_size", "top_k"), [(4096, 512, 3), (2048, 16, 8), (1024, 256, 1)])
def test_pair_ratio_counts_pairs(length, block_size, top_k):
    # The formula counts a causal square as half of it, without its diagonal's other half: equal to 1 / block_size.
    exact = attended_pairs(length) / attended_pairs(length, block_size, top_k)
    assert pair_ratio(length, block_size, top_k) == pytest.approx(exact, rel=1 / block_size)


def test_crossover_needs_all_longer_lengths():
    def row(length, speedup):
        return BenchRow("fp32", length, 16, 2, "fwd", 1.0, speedup, speedup, 1.0, 1.0, 0, 0.0)

    result = BenchResult([row(1, 2.0), row(2, 0.9), row(4, 1.1), row(8, 3.0)])
    assert result.crossovers() == {("fp32", 16, 2, "fwd"): 4}
    assert BenchResult([row(1, 0.5)]).crossovers() == {("fp32", 16, 2, "fwd"): None}


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
