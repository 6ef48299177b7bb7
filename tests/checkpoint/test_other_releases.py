"""A checkpoint that one megatron-core wrote goes on under another: weights, optimizer, schedule and random states.

`tests/assets/checkpoints/RELEASE` holds a checkpoint of step 4 and the numbers of the steps after it, as that release
went on itself. To write those of the installed one: python -m pytest tests/checkpoint/test_other_releases.py
--update-golden
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import megatron.core
import pytest
from distributed import run_ranks
from small_run import read_metrics, small_config, train_here

from moba_megatron.checkpoint import Manifest

ASSETS = Path(__file__).parents[1] / "assets/checkpoints"
INSTALLED = ".".join(megatron.core.__version__.split(".")[:2])
RELEASES = ("0.16", "0.19")
HALF, END = 4, 8


def config_here(**changes):
    """Paths are relative, so that a checkpoint names no machine."""
    return small_config(
        Path("."),
        model__num_layers=2,
        model__hidden_size=16,
        model__ffn_hidden_size=32,
        model__share_embeddings_and_output_weights=True,
        parallel__distributed_optimizer=True,
        parallel__overlap_grad_reduce=True,
        training__steps=END,
        attention__stages=[{"until": 0.75}, {"until": 1.0, "kind": "full"}],
        **changes,
    )


def numbers(folder: Path) -> list[list[float]]:
    return [[line["loss"], line["grad_norm"], line["lr"]] for line in read_metrics(folder)]


def assert_close(now: list[list[float]], folder: Path) -> None:
    then = json.loads((folder / "numbers.json").read_text())
    assert len(now) == len(then) == END - HALF
    for ours, theirs in zip(now, then, strict=True):
        # Products are summed in another order on another CPU.
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_installed_release_can_write_its_own(tmp_path, monkeypatch, request):
    """What is committed for a release is what it does today."""
    monkeypatch.chdir(tmp_path)
    run_ranks(2, train_here, config_here(checkpoint__every=HALF), 2)
    now = numbers(Path("run"))[HALF:]
    target = ASSETS / INSTALLED
    if request.config.getoption("--update-golden"):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(f"run/checkpoints/step_{HALF}", target / f"step_{HALF}")
        (target / "numbers.json").write_text(json.dumps(now, indent=1) + "\n")
    if INSTALLED not in RELEASES:
        pytest.skip(f"no checkpoint of {INSTALLED} is kept")
    assert_close(now, target)


@pytest.mark.parametrize("release", RELEASES)
def test_a_checkpoint_goes_on_under_the_installed_release(tmp_path, monkeypatch, release):
    monkeypatch.chdir(tmp_path)
    saved = ASSETS / release / f"step_{HALF}"
    assert Manifest.read(saved).versions["megatron-core"].startswith(f"{release}.")
    run_ranks(2, train_here, config_here(checkpoint__resume=str(saved)), 2)
    assert_close(numbers(Path("run")), saved.parent)
