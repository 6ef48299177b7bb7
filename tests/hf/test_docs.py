"""The examples in docs/transformers.md run as they are printed, in order."""

from __future__ import annotations

import doctest
import importlib.util
import re
from pathlib import Path

import torch

import moba_megatron.hf.settings

DOCUMENT = Path(__file__).parents[2] / "docs" / "transformers.md"


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python( trainer)?\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert [bool(trainer) for trainer, _ in blocks] == [False, False, False, True]
    names: dict = {}
    texts = []
    for trainer, code in blocks:
        if trainer and importlib.util.find_spec("accelerate") is None:
            continue
        exec(compile(code, str(DOCUMENT), "exec"), names)
        texts.append(names.get("new"))
    assert texts[1].shape == (2, 120) and torch.equal(texts[1], texts[2])


def test_examples_in_docstrings():
    assert doctest.testmod(moba_megatron.hf.settings) == (0, 1)
