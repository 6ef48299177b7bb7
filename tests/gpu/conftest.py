"""Settings for tests on a GPU."""

from __future__ import annotations

import os
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def faults_stay_with_their_test(request: pytest.FixtureRequest):
    """A fault on the GPU, such as an illegal address, lasts as long as the process: the process ends, so that
    pytest-xdist (`-n 1` or more) names this test and goes on with the others in a new one."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{request.node.nodeid}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
