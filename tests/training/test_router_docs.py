"""docs/router.md runs as it is printed, in order: a Llama gets an index, by a warm-up and by sparse training."""

from __future__ import annotations

import json

import pytest
from doc_pages import run_page


@pytest.mark.slow
def test_the_page_runs(tmp_path):
    said = run_page("router.md", tmp_path, ["python", "bash"])
    assert "by the index): the chosen blocks hold" in said[1].replace("\n", " ")
    warm, sparse = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("warm", "sparse")
    )
    assert warm[-1]["router_loss"] < 0.9 * warm[0]["router_loss"] and len(sparse[-1]["routers"]) == 4
    assert sparse[0]["routers"][0]["entropy"] < warm[0]["routers"][0]["entropy"]
