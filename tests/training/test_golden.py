"""Losses that only change on purpose: a run on committed tokens against committed numbers.

To change them: python -m pytest tests/training/test_golden.py --update-golden, and say why in the commit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributed import run_ranks
from small_run import read_metrics, small_config, train_here

GOLDEN = Path(__file__).parents[1] / "assets/losses"

# Products are summed in another order on another CPU: 1e-5 in the loss of a step, and Adam carries differences on.
TOLERANCE = {"fp32": 2e-3, "bf16": 2e-2}

RUNS = {
    "fp32": {"attention__stages": [{"until": 0.75}, {"until": 1.0, "kind": "full"}]},
    "bf16": {"data__cross_document_attention": True, "model__share_embeddings_and_output_weights": True},
}


@pytest.mark.parametrize("precision", list(RUNS))
def test_losses_are_the_committed_ones(tmp_path, precision, request):
    config = small_config(tmp_path, training__steps=20, training__precision=precision, **RUNS[precision])
    run_ranks(1, train_here, config)
    folder = Path(config.run.dir)
    evaluation = read_metrics(folder, "evaluations.jsonl")[-1]
    now = {
        "losses": [line["loss"] for line in read_metrics(folder)],
        "grad_norms": [line["grad_norm"] for line in read_metrics(folder)],
        "validation": [evaluation["loss"], evaluation["trailing_loss"]],
    }
    path = GOLDEN / f"{precision}.json"
    if request.config.getoption("--update-golden"):
        path.write_text(json.dumps(now, indent=1) + "\n")
    golden = json.loads(path.read_text())
    assert now["losses"] == pytest.approx(golden["losses"], abs=TOLERANCE[precision])
    assert now["validation"] == pytest.approx(golden["validation"], abs=TOLERANCE[precision])
    assert now["grad_norms"] == pytest.approx(golden["grad_norms"], rel=10 * TOLERANCE[precision])
    assert now["losses"][-1] < now["losses"][0] - 0.3
