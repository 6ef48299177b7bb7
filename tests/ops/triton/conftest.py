"""In Triton's interpreter: bf16 is rounded as hardware rounds it, and with `--memory-accesses` every launch is watched
on poisoned memory."""

from __future__ import annotations

import contextlib
import os

import pytest


@pytest.fixture(autouse=True)
def interpreter_of_this_test(request: pytest.FixtureRequest):
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import interpreter

    with contextlib.ExitStack() as stack:
        stack.enter_context(interpreter.rounding_to_nearest())
        by_itself = getattr(request.module, "WATCHES_ITSELF", False)
        if by_itself or not request.config.getoption("--memory-accesses"):
            yield
            return
        stack.enter_context(interpreter.poisoned_memory())
        watch = stack.enter_context(interpreter.watching("reverse"))
        yield
    assert not watch.findings, sorted(watch.findings)
