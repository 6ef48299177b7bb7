"""The loop of kills, for half a minute: `make test-faults` goes on for the better part of an hour."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_few_kills_leave_nothing_behind_and_change_nothing():
    loop = Path(__file__).with_name("kill_loop.py")
    asked = ["--kills", "3", "--seed", "7", "--only", "DP 2, distributed optimizer"]
    done = subprocess.run([sys.executable, str(loop), *asked], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert "3 kills over 1 subjects, 0 with faults: none" in done.stdout
