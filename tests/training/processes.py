"""train.py as a user starts it: as one process, under torchrun, and on several nodes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from moba_megatron.config import Config
from moba_megatron.platform.processes import die_with_parent

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "train.py"


def start(
    config: Config, *, ranks: int = 0, overrides: tuple[str, ...] = (), script: Path = TRAIN
) -> subprocess.Popen[str]:
    """Start train.py, or another script with its arguments, under torchrun if `ranks` is given."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    path = write_config(config)
    return start_command([*launcher, str(script), str(path), *overrides], folder=path.parent)


def write_config(config: Config) -> Path:
    """Write the configuration beside its run folder."""
    path = Path(config.run.dir).parent / "config.yaml"
    path.write_text(config.to_yaml())
    return path


def start_command(command: list[str], *, folder: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    """Start a command in a folder, with one thread, output and errors in one pipe, and changes to the environment. It
    ends with the tests, however they end."""
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a process, check its exit code, and return its output."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def wait_for_step(config: Config, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until metrics.jsonl holds a step."""
    metrics = Path(config.run.dir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= step):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no step within two minutes"
        time.sleep(0.02)


def processes_of(config: Config) -> list[psutil.Process]:
    """Every process of this machine that was started with this configuration: launchers, ranks and their helpers."""
    path = str(Path(config.run.dir).parent / "config.yaml")
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if path in process.cmdline():
                found.append(process)
    return found


def rank_of(config: Config, rank: int, script: Path = TRAIN) -> psutil.Process:
    """The process of a rank, of train.py or of another script."""
    (process,) = [
        process
        for process in processes_of(config)
        if str(script) in process.cmdline() and process.environ().get("RANK") == str(rank)
    ]
    return process
