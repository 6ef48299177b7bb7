"""Temporary files of killed processes go with the next start."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import run_ranks

from moba_megatron.platform.temporary import remove_own_temporary_folder, use_own_temporary_folder


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path, as /tmp is; that of pytest is a long one."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_stays(short):
    def use_and_die() -> None:
        use_own_temporary_folder()
        tempfile.mkdtemp(prefix="pymp-")
        os.kill(os.getpid(), signal.SIGKILL)

    def use() -> tuple[list[str], bool, str, list[str]]:
        tempfile.tempdir = str(short)
        child = os.fork()
        if child == 0:
            use_and_die()
        os.waitpid(child, 0)
        (left,) = os.listdir(short)
        here = use_own_temporary_folder()
        # Asked again, and by a process that this one forks, they stay apart.
        again, theirs = use_own_temporary_folder(), None
        child = os.fork()
        if child == 0:
            theirs = use_own_temporary_folder()
            os._exit(0 if theirs != here and here.is_dir() and tempfile.gettempdir() == str(theirs) else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 0 and left not in os.listdir(short) and os.environ["TMPDIR"] == str(here)
        remove_own_temporary_folder()
        return again == here, here.exists()

    assert run_ranks(1, use, prepare=False) == [(True, False)]
    assert all("moba_megatron" in name for name in os.listdir(short))


def test_a_path_that_is_too_long_for_sockets_is_left_alone(tmp_path):
    def use() -> bool:
        deep = Path(tmp_path, "d" * 60)
        deep.mkdir()
        tempfile.tempdir = str(deep)
        return use_own_temporary_folder() == deep and not list(deep.iterdir())

    assert run_ranks(1, use, prepare=False) == [True]
