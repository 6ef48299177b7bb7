"""A disk that is full, or takes no larger file: one line says which file, how much it needed and how much there is;
what was saved before stays, and the run goes on from there."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from processes import finish, start, wait_for_step
from small_run import numbers_of, read_metrics, small_config, train_here

from moba_megatron.checkpoint import list_checkpoints
from moba_megatron.config import Config

pytestmark = pytest.mark.once


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB: room for a few checkpoints of the small run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system of limited size")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def on_disk(tmp_path: Path, disk: Path, **changes: Any) -> Config:
    return small_config(tmp_path, run__dir=str(disk / "run"), **changes)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill the disk up to `leave` bytes."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as stream:
        while (room := shutil.disk_usage(disk).free - leave) > 0:
            stream.write(b"x" * min(room, 4096))
    return filler


def status_of(config: Config) -> dict[str, Any]:
    return json.loads((Path(config.run.dir) / "status.json").read_text())


def test_a_run_whose_disk_is_full_ends_in_one_line_and_goes_on_when_there_is_room(tmp_path, disk):
    (tmp_path / "whole").mkdir()
    whole = small_config(tmp_path / "whole", checkpoint__every=2)
    config = on_disk(tmp_path, disk, checkpoint__every=2)
    paused = config.model_copy(update={"training": config.training.model_copy(update={"stop_after": 2})})
    assert run_ranks(1, train_here, paused) == [("paused", 2)]
    filler = fill(disk, leave=300_000)
    output = finish(start(config), code=1)
    (line,) = re.findall(r"^\[rank 0\] failed: .*", output, re.M)
    assert re.search(r"step_4 needs about \d+\.\d kB, and its disk has [\d.]+ kB left: make room", line), line
    assert "Traceback" not in output
    assert [path.name for path in list_checkpoints(Path(config.run.dir) / "checkpoints")] == ["step_2"]
    assert status_of(config)["state"] == "failed" and "step_4" in status_of(config)["error"]
    filler.unlink()
    assert run_ranks(1, train_here, config) == run_ranks(1, train_here, whole) == [("finished", 8)]
    assert numbers_of(read_metrics(Path(config.run.dir))) == numbers_of(read_metrics(Path(whole.run.dir)))


def test_a_line_of_metrics_that_finds_no_room_is_named(tmp_path, disk):
    config = on_disk(tmp_path, disk, training__steps=4000)
    process = start(config)
    wait_for_step(config, 3, process)
    fill(disk)
    output = finish(process, code=1)
    (line,) = re.findall(r"^\[rank 0\] failed: .*", output, re.M)
    full = r"run/metrics.jsonl: the disk is full \(\d+ bytes were to be written, [\d,]+ are free\): make room"
    assert re.search(full, line), line
    assert "Traceback" not in output and status_of(config)["state"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_save_that_fails_may_be_passed_over_and_comes_again(tmp_path, disk, ranks):
    config = on_disk(tmp_path, disk, training__steps=40, checkpoint__every=2, checkpoint__on_save_error="continue")
    process = start(config, ranks=ranks)
    wait_for_step(config, 5, process)
    filler = fill(disk, leave=200_000)
    wait_for_step(config, read_metrics(Path(config.run.dir))[-1]["step"] + 6, process)
    kept = list_checkpoints(Path(config.run.dir) / "checkpoints")
    filler.unlink()
    output = finish(process)
    assert kept and re.search(r"checkpoint not written, step_\d+ stays \(checkpoint.on_save_error = continue\)", output)
    assert status_of(config)["state"] == "finished"
    assert [p.name for p in list_checkpoints(Path(config.run.dir) / "checkpoints")] == ["step_38", "step_40"]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_write_that_fails_in_the_middle_is_told_to_all_ranks(tmp_path, asynchronous):
    """No file may be over 100 kB, so that the parts of a checkpoint cannot be written."""
    config = small_config(
        tmp_path,
        checkpoint__every=3,
        checkpoint__on_save_error="continue",
        checkpoint__asynchronous=asynchronous,
        training__steps=8,
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        process = start(config, ranks=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("checkpoint not written, there is none before it") == 2, output
    assert re.search(r"^\[rank \d\] failed: SaveError: .*checkpoints: .*File too large", output, re.M)
    # That of torchrun.
    assert output.count("Traceback") == 1, output
    assert status_of(config)["state"] == "failed" and len(read_metrics(Path(config.run.dir))) == 8
    assert not list((Path(config.run.dir) / "checkpoints").iterdir())
