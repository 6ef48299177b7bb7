"""docs/moe.md runs as it is printed, in order: a mixture of experts to MoBA training on two ranks, to an export; a
dense model to a mixture."""

from __future__ import annotations

import json

import pytest
from doc_pages import run_page
from safetensors.torch import load_file


@pytest.mark.slow
def test_the_page_runs(tmp_path):
    said = run_page("moe.md", tmp_path, ["python", "bash", "bash", "python", "bash"])
    assert "verified" in said[2] and "torch.Size([1, 12, 257])" in said[3] and "verified" in said[4]
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4] and len(metrics[-1]["experts"]) == 4
    values = json.loads((tmp_path / "exported/config.json").read_text())
    assert (values["model_type"], values["num_experts"], values["norm_topk_prob"]) == ("qwen3_moe", 8, True)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "exported"))
    assert {name: tensor.shape for name, tensor in before.items()} == {name: t.shape for name, t in after.items()}
