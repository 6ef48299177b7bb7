"""launch/slurm.sbatch on a real Slurm: a job told to stop saves, is requeued and goes on with the same losses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from scaling.sweep_examples import write_sweep
from slurm_cluster import slurm_cluster, why_not
from small_run import TOKENS, copy_tokens, numbers_of, read_metrics, train_here
from transformers import LlamaConfig, LlamaForCausalLM

from moba_megatron.config import load_config
from moba_megatron.corpus.indexed import write_index
from moba_megatron.scaling.results import read_results
from moba_megatron.scaling.runner import run_sweep
from moba_megatron.scaling.sweep import load_sweep

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


def eight_billion_parameters(folder: Path) -> None:
    """Llama 3.1 8B as far as a check reads it: its configuration, and a file of weights whose data are a hole."""
    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    more = {"intermediate_size": 14336, "vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    more |= {"max_position_embeddings": 2**17, "architectures": ["LlamaForCausalLM"]}
    config = LlamaConfig(**shape, **more, rope_scaling=scaling)
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    shutil.copytree(TOKENS / "tokenizer", folder, dirs_exist_ok=True)


def one_long_document(prefix: Path, tokens: int) -> None:
    prefix.parent.mkdir(exist_ok=True)
    np.zeros(tokens, np.uint16).tofile(f"{prefix}.bin")
    write_index(prefix, np.dtype("<u2"), 1, lambda: [np.array([tokens])])


def test_continued_pretraining_is_a_chain_of_jobs(cluster, tmp_path, monkeypatch):
    eight_billion_parameters(tmp_path)
    data = tmp_path / "long"
    monkeypatch.setenv("DATA", str(data))
    options = ["--hold", "--nodes=1", "--gpus-per-node=2", "--cpus-per-task=1"]
    command = [ROOT / "launch/continued_pretraining.sh", "llama3.1_8b", "64", tmp_path, *options]
    one_long_document(data / "train", 2**20 + 1)
    # Enough to validate on at 512K tokens, not at 1M.
    one_long_document(data / "validation", 8 * 2**19 + 2)
    with pytest.raises(subprocess.CalledProcessError) as refused:
        cluster.call(*command)
    assert "holds 4194306 tokens" in refused.value.stderr and "8 are needed" in refused.value.stderr
    assert refused.value.stdout.count("checked ") == 3 and "job" not in refused.value.stdout
    one_long_document(data / "validation", 8 * 2**20 + 2)
    lines = cluster.call(*command).splitlines()
    assert [line.startswith("checked ") for line in lines] == [True] * 5 + [False] * 5
    lines = lines[5:]
    jobs = [line.split()[1].rstrip(":") for line in lines]
    assert len(jobs) == 5 and lines[0].endswith(f"128k.yaml from {tmp_path}")
    assert lines[4].endswith("1m_moba.yaml from runs/continued_pretraining/llama3.1_8b/1m")
    for before, job in zip(jobs, jobs[1:], strict=False):
        shown = cluster.call("scontrol", "show", "job", job)
        assert f"Dependency=afterok:{before}" in shown
        assert f"data.tokenizer={tmp_path}" in shown and f"data.train={data}/train" in shown
    cluster.call("scancel", *jobs)


def test_a_sweep_is_an_array_of_jobs(cluster, tmp_path, monkeypatch):
    """A task without time ends with 3 and is submitted again; one with time finishes its run."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    axes = {"size": {"one": {"model.num_layers": 1, "attention.last_n_full": 0}, "two": {"model.num_layers": 2}}}
    path, log = write_sweep(tmp_path, axes=axes, figures=[{"kind": "curves"}]), tmp_path / "job.log"
    options = ["--gpus-per-node=1", "--cpus-per-task=1", "--overcommit", "--time=60", f"--output={log}"]

    def submit(*more: str) -> tuple[str, list[str]]:
        """The array that the sweep asks for, and how its tasks end."""
        line = cluster.call("moba-megatron", "scaling", "run", path, "--slurm", "launch/sweep.sbatch", cwd=ROOT)
        command, array, *arguments = line.split()
        job = cluster.call(command, "--parsable", array, *options, *more, *arguments, cwd=ROOT).strip()
        ended = "COMPLETED", "FAILED"
        tasks = [f"{job}_{number}" for number in array.removeprefix("--array=").split(",")]
        for task in tasks:
            wait_for(lambda task=task: cluster.state(task) in ended, f"{task} ended", log)
        return array, [cluster.state(task) for task in tasks]

    assert submit("--export=ALL,MINUTES=0") == ("--array=0,1", ["FAILED", "FAILED"])
    assert "time is up" in log.read_text()
    run_sweep(load_sweep(path), load_sweep(path).points[:1], jobs=1)
    # Of an hour there are ten minutes less.
    assert submit() == ("--array=1", ["COMPLETED"]), log.read_text()
    assert [result.state for result in read_results(load_sweep(path))] == ["finished"] * 2
