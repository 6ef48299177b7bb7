"""Where full attention is expected to be faster than MoBA: both sides of the crossover, and the model's numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moba_megatron.cli import app
from moba_megatron.config import load_config
from moba_megatron.model.schedule import checked_schedule
from moba_megatron.planning.attention_advice import advice_here, slower_than_full
from moba_megatron.planning.kernel_model import AttentionSizes, dense_seconds, expected_seconds
from moba_megatron.planning.plan_machines import GPUS, Cluster

CONFIG = Path(__file__).parents[2] / "configs/paper/scaling_8k.yaml:545m_moba"
H100 = Cluster(GPUS["h100"], 8)


def slow_on(cluster: Cluster, *overrides: str):
    config = load_config(CONFIG, list(overrides))
    return slower_than_full(config, checked_schedule(config), cluster)


@pytest.mark.parametrize("context", [1, 2])
def test_both_sides_of_the_crossover(context):
    """(4096, 12): covered at 32K, too many pairs and seven products for each at 64K, worth it from 256K on."""
    sizes = ["attention.block_size=4096", "attention.top_k=12", f"parallel.context={context}"]
    assert slow_on(H100, "data.sequence_length=32768", *sizes) == []
    (slow,) = slow_on(H100, "data.sequence_length=65536", *sizes)
    assert 1.2 < slow.ratio < 2 and (slow.context, slow.gpu) == (context, "H100")
    assert slow_on(H100, "data.sequence_length=262144", *sizes) == []


def test_the_numbers_are_those_of_the_kernel_model():
    (slow,) = slow_on(H100, "data.sequence_length=4096", "attention.block_size=64", "attention.top_k=16")
    sizes = AttentionSizes(4096, 14, 14, 128, 64, 16)
    micro_batch = load_config(CONFIG).training.micro_batch_size
    assert slow.moba_seconds == pytest.approx(micro_batch * expected_seconds(sizes, H100.gpu.machine, True))
    assert slow.full_seconds == pytest.approx(micro_batch * dense_seconds(sizes, H100.gpu.machine, True))
    numbers = [f"{seconds * 1e3:.3g}" for seconds in (slow.moba_seconds, slow.full_seconds)]
    assert f"{numbers[0]} against {numbers[1]} ms" in slow.line
    assert slow.line.startswith(f"(64, 16) at 4,096 tokens: MoBA takes {slow.ratio:.1f} x the time of full attention")
    assert "on H100 (estimate: " in slow.line and "attention.kind=full" in slow.line and "1,024 tokens" in slow.line
    assert "\n" not in slow.line


def test_every_setting_of_a_schedule_is_looked_at_once():
    stages = [
        {"until": 0.5, "block_size": 64, "top_k": 16},
        {"until": 0.9, "block_size": 512, "top_k": 3},
        {"until": 1.0, "kind": "full"},
    ]
    found = slow_on(H100, "data.sequence_length=2048", f"attention.stages={json.dumps(stages)}")
    assert [(slow.layer.block_size, slow.layer.top_k) for slow in found] == [(64, 16), (512, 3)]
    assert slow_on(H100, "data.sequence_length=2048", "attention.kind=full") == []


def test_a_run_is_told_on_a_gpu_that_is_known():
    config = load_config(CONFIG, ["data.sequence_length=2048"])
    (line,) = advice_here(config, checked_schedule(config), "NVIDIA A100-SXM4-80GB", 8)
    assert line.startswith("attention: (512, 3) at 2,048 tokens: MoBA takes") and "on A100" in line
    assert advice_here(config, checked_schedule(config), "NVIDIA GeForce RTX 4090", 8) == []
    other = load_config(CONFIG, ["data.sequence_length=2048", "training.precision=fp32"])
    assert advice_here(other, checked_schedule(other), "NVIDIA H100 80GB HBM3", 8) == []


def test_the_plan_says_it(tmp_path):
    def planned(length: int) -> tuple[str, list]:
        arguments = ["plan", str(CONFIG), f"data.sequence_length={length}", "--gpus", "8", "--layouts", "0", "--json"]
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*arguments, str(tmp_path / "plan.json")])
        assert result.exit_code == 0, result.output
        return result.output, json.loads((tmp_path / "plan.json").read_text())["plan"]["slower_than_full_attention"]

    output, (slow,) = planned(2048)
    assert slow["message"] in output and slow["moba_seconds"] > slow["full_seconds"] > 0
    assert re.search(r"\(512, 3\) at 2,048 tokens: MoBA takes \d\.\d x", output)
    output, none = planned(8192)
    assert none == [] and "MoBA takes" not in output
