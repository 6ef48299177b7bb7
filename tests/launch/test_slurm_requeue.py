"""launch/slurm.sbatch on a real Slurm: a job told to stop saves, is requeued and goes on with the same losses."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from distributed import run_ranks
from slurm_cluster import slurm_cluster, why_not
from small_run import copy_tokens, numbers_of, read_metrics, train_here

from moba_megatron.config import load_config

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs/quickstart/moba.yaml"
STEPS = 40


def overrides(folder: Path, run: str) -> list[str]:
    """The quickstart's model on the synthetic tokens, shortened."""
    tokens = copy_tokens(folder)
    return [
        f"run.dir={folder / run}", "run.threads=1", f"data.train={tokens / 'train'}",
        f"data.validation={tokens / 'validation'}", f"data.tokenizer={tokens / 'tokenizer'}",
        "data.sequence_length=512", "attention.block_size=64", f"training.steps={STEPS}", "optimizer.warmup_steps=5",
        "checkpoint.every=1000", "evaluation.every=1000", "evaluation.samples=4", "logging.tensorboard=false",
    ]  # fmt: skip


def wait_for(condition, what: str, log: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {what}\n{log.read_text() if log.exists() else 'no log'}")
        time.sleep(0.1)


def steps_of(run: Path) -> int:
    return len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0


pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "files") as cluster:
        yield cluster


def test_a_requeued_job_has_the_losses_of_an_uninterrupted_one(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, cut, log = tmp_path / "whole", tmp_path / "cut", tmp_path / "job.log"
    config = load_config(QUICKSTART, overrides(tmp_path, "whole"))
    assert run_ranks(2, train_here, config, 2, timeout=300) == [("finished", STEPS)] * 2
    options = ["--gpus-per-node=2", "--cpus-per-task=1", "--overcommit", f"--output={log}"]
    submitted = cluster.call(
        "sbatch", "--parsable", *options, "launch/slurm.sbatch", QUICKSTART, *overrides(tmp_path, "cut"), cwd=ROOT
    )
    job = submitted.strip()
    wait_for(lambda: steps_of(cut) >= 5, "five steps", log)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: "start 1" in log.read_text(), "requeued", log)
    wait_for(lambda: cluster.state(job) == "COMPLETED", "completed", log)
    lines = log.read_text()
    print(lines)
    assert "start 0" in lines and "start 2" not in lines and "resuming from" in lines
    assert lines.count("stopped by SIGUSR1 after step") == 1
    assert json.loads((cut / "status.json").read_text())["state"] == "finished"
    assert numbers_of(read_metrics(cut)) == numbers_of(read_metrics(whole)) and steps_of(cut) == STEPS


def test_a_job_that_is_stopped_and_not_requeued_fails(cluster, tmp_path, monkeypatch):
    """The signal reaches the ranks past the batch shell, which knows of no reason to requeue."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run, log = tmp_path / "run", tmp_path / "job.log"
    options = ["--gpus-per-node=2", "--cpus-per-task=1", "--overcommit", f"--output={log}"]
    command = ["launch/slurm.sbatch", QUICKSTART, *overrides(tmp_path, "run")]
    job = cluster.call("sbatch", "--parsable", *options, *command, cwd=ROOT).strip()
    wait_for(lambda: steps_of(run) >= 2, "two steps", log)
    cluster.call("scancel", "--signal=USR1", job)
    wait_for(lambda: cluster.state(job) not in ("RUNNING", "COMPLETING"), "ended", log)
    assert cluster.state(job) == "FAILED", log.read_text()
    assert "the ranks ended with 0" in log.read_text() and "not finished, and not requeued" in log.read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"


def test_continued_pretraining_is_a_chain_of_jobs(cluster, tmp_path):
    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    more = {"intermediate_size": 14336, "vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
    architecture = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps({**architecture, **shape, **more}))
    (tmp_path / "tokenizer.json").touch()
    options = ["--hold", "--nodes=1", "--gpus-per-node=2", "--cpus-per-task=1"]
    script = ROOT / "launch/continued_pretraining.sh"
    lines = cluster.call(script, "llama3.1_8b", "64", tmp_path, *options).splitlines()
    assert [line.startswith("checked ") for line in lines] == [True] * 5 + [False] * 5
    lines = lines[5:]
    jobs = [line.split()[1].rstrip(":") for line in lines]
    assert len(jobs) == 5 and lines[0].endswith(f"128k.yaml from {tmp_path}")
    assert lines[4].endswith("1m_moba.yaml from runs/continued_pretraining/llama3.1_8b/1m")
    for before, job in zip(jobs, jobs[1:], strict=False):
        shown = cluster.call("scontrol", "show", "job", job)
        assert f"Dependency=afterok:{before}" in shown
        assert f"data.tokenizer={tmp_path}" in shown
    cluster.call("scancel", *jobs)
