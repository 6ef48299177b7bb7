"""The kernels in Triton's interpreter, on CPU tensors: the files `interpreted_*.py`, each in a process of its own,
because Triton decides for the interpreter when it is imported.

Larger cases are marked slow and left out here; `make test-slow` runs them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "name", ["routing", "screening", "selection", "router", "attention", "fragments", "context", "decode", "accesses"]
)
def test_in_the_interpreter(name):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    done = subprocess.run(
        [*command, str(HERE / f"interpreted_{name}.py")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
