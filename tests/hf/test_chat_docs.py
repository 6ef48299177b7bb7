"""docs/chat.md runs as it is printed, in order: an instruct model and chats to a trained, exported, tuned, merged and
evaluated MoBA model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("trl", reason="the page tunes by TRL")
pytest.importorskip("peft", reason="the page tunes by LoRA")


@pytest.mark.slow
def test_the_page_runs(tmp_path):
    page = (ROOT / "docs/chat.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(python|bash)\n(.*?)```", page, flags=re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "bash", "bash", "python", "bash"]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MOBA_MEGATRON": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
    }
    said = []
    for kind, code in blocks:
        command = [sys.executable, "-c", code] if kind == "python" else ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{code}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        said.append(done.stdout)
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
