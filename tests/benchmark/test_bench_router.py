"""The operator benchmark with a router that chooses blocks, on tiny settings."""

import csv
import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

import moba_megatron.benchmark.operator as bench
from moba_megatron.benchmark import routing
from moba_megatron.benchmark.operator import run_bench
from moba_megatron.benchmark.settings import BenchRouter, BenchSettings
from moba_megatron.cli import app
from moba_megatron.ops import Router, moba_attention

TINY = {"lengths": (96,), "blocks": ((16, 3),), "dtypes": ("fp32",), "runs": 1, "head_size": 8}


@pytest.mark.parametrize(
    "router",
    [BenchRouter(6), BenchRouter(6, "query", "key", "dense"), BenchRouter(4, "query", "shared", "none")],
    ids=lambda router: router.words,
)
def test_a_router_is_measured(tmp_path, router):
    result = run_bench(BenchSettings(**TINY, router=router), tmp_path, console=Console(file=io.StringIO()))
    assert result.refused == [] and [row.mode for row in result.rows] == ["fwd", "fwd+bwd"]
    rows = list(csv.DictReader(open(tmp_path / "bench.csv")))
    assert {row["router"] for row in rows} == {router.words} and "router" in (tmp_path / "bench.md").read_text()


@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
@pytest.mark.parametrize("router", [BenchRouter(6), BenchRouter(6, "query", "key", "dense")])
def test_the_gate_passes_in_other_dtypes(dtype, router):
    assert bench.disagreement(BenchSettings(**TINY, router=router), dtype, 64, 3) is None


@pytest.mark.parametrize("router", [BenchRouter(6), BenchRouter(6, loss="dense")])
def test_a_wrong_loss_is_refused(monkeypatch, router):
    def wrong(q, k, v, *, router, backend, **settings):
        factor = 1.0 if backend == "reference" else 1.01
        return moba_attention(q, k, v, backend=backend, **settings, router=Router(router.q * factor, *rest(router)))

    def rest(router):
        return router.k, router.loss, router.loss_mask

    monkeypatch.setattr(routing, "moba_attention", wrong)
    assert "differs" in bench.disagreement(BenchSettings(**TINY, router=router), "fp32", 16, 3)


def test_a_choice_by_others_is_refused(monkeypatch):
    """An operator that ignores its router."""

    def ignores(q, k, v, *, router, **settings):
        found = moba_attention(q, k, v, router=router, **settings)
        return moba_attention(q, k, v, **settings) if router.loss == "none" else found

    monkeypatch.setattr(routing, "moba_attention", ignores)
    assert "out differs" in bench.disagreement(BenchSettings(**TINY, router=BenchRouter(6)), "fp32", 16, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--router-dim 6 --decode", "--router-dim is not measured with --decode"),
        ("--router-dim 6 --context-parallel 2", "not measured with --context-parallel"),
        ("--router-heads query", "--router-heads without a router: add --router-dim"),
        ("--router-dim 5", "--router-dim 5 is not a positive even number"),
        ("--router-dim 6 --router-loss much", "unknown --router-loss 'much'"),
        ("--router-dim 6 --backend flash_moba", "backend flash_moba has none"),
        ("--router-dim 6 --preset targets", "the targets are of MoBA"),
    ],
)
def test_what_is_not_measured_is_refused_in_words(tmp_path, options, words):
    done = CliRunner().invoke(app, ["bench", *options.split(), "--output", str(tmp_path / "bench")])
    assert done.exit_code != 0 and words in done.output + done.stderr, done.output
