"""docs/chat.md runs as it is printed, in order: an instruct model and chats to a trained, exported, tuned, merged and
evaluated MoBA model."""

from __future__ import annotations

import json
import re

import pytest
from doc_pages import run_page

pytest.importorskip("trl", reason="the page tunes by TRL")
pytest.importorskip("peft", reason="the page tunes by LoRA")


@pytest.mark.slow
def test_the_page_runs(tmp_path):
    said = run_page("chat.md", tmp_path, ["python", "bash", "bash", "python", "bash"])
    # The tools, the question and what the tool said are not learned.
    data, *_ = re.findall(r"--- .*? not learned\n(.*?)--- .*?, learned\n(.*?)\n---", said[1], flags=re.DOTALL)
    assert '"name": "weather", "parameters"' in data[0] and "How is" in data[0]
    assert data[1].startswith('{"name": "weather", "arguments": {"city":')
    assert "verified" in said[2]
    for folder in ("exported", "merged"):
        settings = json.loads((tmp_path / folder / "config.json").read_text())["moba_config"]
        assert (settings["block_size"], settings["top_k"], settings["decode"]) == (64, 3, "moba")
    results = json.loads((tmp_path / "merged/evaluation/tasks_moba.json").read_text())
    assert results["attention"] == "moba"
