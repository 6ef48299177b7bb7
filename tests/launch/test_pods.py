"""launch/pod.sh without Kubernetes: two pods on loopback; one gets TERM, both fail, are started again and finish."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from small_run import read_metrics, small_config

from moba_megatron.platform.processes import die_with_parent

ROOT = Path(__file__).parents[2]
STEPS = 60


def start_pod(rank: int, port: int, log: Path, *program: str | Path) -> subprocess.Popen[bytes]:
    operator = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **operator, "RANKS": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        return subprocess.Popen(
            [ROOT / "launch/pod.sh", *program], stdout=file, stderr=file, env=environment, preexec_fn=die_with_parent
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("evicted", [0, 1])
def test_pods_go_on_after_one_was_evicted(tmp_path, evicted):
    config = small_config(tmp_path, training__steps=STEPS)
    path, run = tmp_path / "config.yaml", Path(config.run.dir)
    path.write_text(config.to_yaml())
    logs = [tmp_path / f"pod_{rank}" for rank in (0, 1)]
    port = free_port()
    pods = [start_pod(rank, port, log, path) for rank, log in enumerate(logs)]
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < 3:
        assert all(pod.poll() is None for pod in pods) and time.monotonic() < deadline, logs[0].read_text()
        time.sleep(0.02)
    pods[evicted].send_signal(signal.SIGTERM)
    codes = [pod.wait(timeout=120) for pod in pods]
    assert 0 not in codes, (codes, *(log.read_text() for log in logs))
    assert 3 <= len(read_metrics(run)) < STEPS
    pods = [start_pod(rank, port, log, path) for rank, log in enumerate(logs)]
    assert [pod.wait(timeout=200) for pod in pods] == [0, 0], logs[0].read_text()
    assert "resuming from" in logs[0].read_text() and len(read_metrics(run)) == STEPS
    # One that is started once more does not wait for the other.
    assert start_pod(1, port, logs[1], path).wait(timeout=30) == 0
    # Its evaluation, in pods as well.
    evaluation = "evaluate", run, "--parallel", "context=2", "--samples", "1"
    pods = [start_pod(rank, port, log, *evaluation) for rank, log in enumerate(logs)]
    assert [pod.wait(timeout=200) for pod in pods] == [0, 0], logs[0].read_text()
    assert "context 2" in logs[0].read_text() and list((run / "evaluation").glob("*.json"))
