"""README and docs say what is true: the tree, the commands, the links."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from moba_megatron.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def tree_paths() -> list[str]:
    """Paths of the README's tree: each line is a path, then a phrase."""
    block = README.split("## What is where")[1].split("```text\n")[1].split("```")[0]
    return [line.split()[0].rstrip("/") for line in block.splitlines()]


def test_the_tree_is_there_and_whole():
    paths = tree_paths()
    assert [path for path in paths if not (ROOT / path).exists()] == []
    top = {"pyproject.toml", "train.py", "moba_megatron", "configs", "data", "launch", "tests", "docs", "Makefile"}
    assert top <= set(paths)
    page = (ROOT / "docs/architecture.md").read_text()
    packages = {f"moba_megatron/{p.parent.name}/" for p in (ROOT / "moba_megatron").glob("*/__init__.py")}
    assert [name for name in packages if f"`{name}`" not in page] == []
    modules = {p.name for p in (ROOT / "moba_megatron").glob("*.py") if p.name != "__init__.py"}
    assert [name for name in modules if f"`{name}`" not in page and f"`moba_megatron/{name}`" not in page] == []


def test_commands_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)$", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    for command in re.findall(r"^moba-megatron (\S+)", README, flags=re.MULTILINE):
        assert command in COMMANDS
    for line in re.findall(r"^(?:python|torchrun).* train\.py .*$", README, flags=re.MULTILINE):
        config = next(word for word in shlex.split(line) if word.endswith(".yaml"))
        assert (ROOT / config).is_file()


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_train_py_is_thin():
    """What it does is in the package: it defines `main` alone, and `main` has no loop."""
    module = ast.parse((ROOT / "train.py").read_text())
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    repeated = (ast.For, ast.AsyncFor, ast.While, ast.comprehension)
    assert [node.name for node in ast.walk(module) if isinstance(node, defined)] == ["main"]
    assert not [node.lineno for node in ast.walk(module) if isinstance(node, repeated)]
    # Beside it: the docstring, imports, and the call of a program.
    assert {type(node) for node in module.body} == {ast.Expr, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.If}
