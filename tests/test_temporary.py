"""What a killed process leaves in the temporary folder: one folder, which the next process removes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moba_megatron.temporary import PREFIX, leave_wandb_out, let_wandb_in, remove_abandoned

# A manager, as megatron-core's checkpoint writer starts one, and a wait.
HOLDS = """
import sys, time, multiprocessing
from multiprocessing.managers import SyncManager
from moba_megatron.temporary import keep_temporary_files_together
keep_temporary_files_together()
manager = SyncManager(ctx=multiprocessing.get_context("fork"))
manager.start()
queue = manager.Queue()
print("ready", flush=True)
time.sleep(float(sys.argv[1]))
"""


def start(folder: Path, seconds: float, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(seconds)],
        env={**os.environ, "TMPDIR": str(folder), **environment},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder of a name that leaves room for sockets, unlike that of a test."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_a_regular_end_leaves_nothing(short: Path):
    assert start(short, 0.0).wait(30) == 0
    assert list(short.iterdir()) == []


def test_what_a_kill_leaves_is_removed_and_what_is_in_use_is_not(short: Path):
    killed, alive = start(short, 60.0), start(short, 60.0)
    try:
        names = {path.name for path in short.iterdir()}
        assert len(names) == 2 and all(name.startswith(PREFIX) for name in names)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait(30)
        deadline = time.monotonic() + 10
        while len(list(short.iterdir())) > 1 and time.monotonic() < deadline:
            remove_abandoned(short)
            time.sleep(0.05)
        (left,) = short.iterdir()
        assert left.name.startswith(f"{PREFIX}{alive.pid}-") and list(left.glob("listener-*"))
    finally:
        for process in (killed, alive):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def test_the_folder_of_torchrun_goes_when_its_ranks_are_gone(short: Path):
    mine, foreign = short / "torchelastic_a/run/attempt_0/0", short / "torchelastic_b"
    mine.mkdir(parents=True)
    foreign.mkdir()
    ranks = [start(short, 60.0, TORCHELASTIC_ERROR_FILE=str(mine / "error.json")) for _ in range(2)]
    for number, rank in enumerate(ranks):
        remove_abandoned(short)
        assert mine.is_dir(), f"{number} of 2 ranks have gone"
        os.killpg(rank.pid, signal.SIGKILL)
        rank.wait(30)
    deadline = time.monotonic() + 10
    while mine.is_dir() and time.monotonic() < deadline:
        remove_abandoned(short)
        time.sleep(0.05)
    assert not mine.is_dir() and foreign.is_dir(), "one without our lock is somebody else's"


def test_other_folders_of_such_names_stay(short: Path):
    """A run folder has a file called lock, which another kind of lock holds."""
    for name in ("moba-8k", "moba-12-abc", "moba-1234-abcd_fg8"):
        (short / name).mkdir()
        (short / name / "lock").write_text("")
    remove_abandoned(short)
    assert len(list(short.iterdir())) == 3


def test_a_long_name_is_left_to_multiprocessing(tmp_path: Path):
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    code = "from moba_megatron.temporary import keep_temporary_files_together as keep; keep()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(folder)}, check=True, timeout=60)
    assert list(folder.iterdir()) == []


def test_wandb_is_found_by_nobody_until_it_is_let_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    leave_wandb_out()
    with pytest.raises(ImportError):
        importlib.import_module("wandb")
    assert importlib.util.find_spec("wandb") is None
    let_wandb_in()
    assert importlib.util.find_spec("wandb") is not None and "wandb" not in sys.modules
