"""Files are UTF-8 and the terminal shows what it can, whatever the locale says."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0", "NO_COLOR": "1"}


def opened_as_text(source: str) -> list[ast.Call]:
    """Calls that read or write a file as text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", None))
        if name in ("read_text", "write_text"):
            found.append(node)
        elif name == "open" and not ast.unparse(node.func).startswith(("os.", "webbrowser.")):
            place = 0 if isinstance(node.func, ast.Attribute) else 1
            mode = node.args[place] if len(node.args) > place else ast.Constant("r")
            if not (isinstance(mode, ast.Constant) and "b" in str(mode.value)):
                found.append(node)
    return found


def test_text_is_found():
    source = "open(a)\nopen(a, 'rb')\np.open('w', encoding='utf-8')\np.read_text()\nos.open(p, 0)\np.open('ab')\n"
    assert [node.lineno for node in opened_as_text(source)] == [1, 3, 4]


def test_every_text_file_names_its_encoding():
    missing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [*(ROOT / "moba_megatron").rglob("*.py"), ROOT / "train.py"]
        for node in opened_as_text(path.read_text(encoding="utf-8"))
        if not any(keyword.arg == "encoding" for keyword in node.keywords)
    ]
    assert missing == []


@pytest.fixture
def folder(tmp_path):
    """A folder with a configuration that speaks of more than ASCII."""
    text = (
        f'# Läufe ≥ 1\nbase: {ROOT}/configs/quickstart/moba.yaml\nrun: {{dir: "läufe/✓"}}\nmodel: {{vocab_size: 512}}\n'
    )
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], env={**os.environ, **ASCII}, cwd=ROOT, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode("ascii")


def test_a_locale_of_ascii_is_no_error(folder):
    program = "accept_any_text(); print(chr(228), open('README.md').read())"
    said = run("-c", f"from moba_megatron.before_torch import *; {program}")
    assert said.startswith("\\xe4 #") and "\\u2503" in said
    # torch and megatron-core read files of theirs in the encoding of the locale.
    program = "accept_any_text(); import megatron.core; from moba_megatron.config import load_config"
    said = run(
        "-c", f"from moba_megatron.before_torch import *; {program}; print(load_config('{folder}/config.yaml').run)"
    )
    assert said == "dir='l\\xe4ufe/\\u2713' seed=1234 threads=None stall_seconds=300.0\n"
