"""Who may import whom: never upward, never in a circle (docs/architecture.md holds the same table)."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "moba_megatron"

ALLOWED = {
    "config": set(),
    "ops": set(),
    "hf": {"ops"},
    "platform": {"config"},
    "parallel": {"ops"},
    "model": {"parallel", "ops", "platform", "config"},
    "checkpoint": {"model", "platform", "config"},
    "data": {"parallel", "config"},
    "planning": {"config", "data", "hf", "model", "ops", "parallel"},
    "convert": {"hf", "checkpoint", "model", "data", "config", "platform"},
    "generation": {"convert", "hf", "checkpoint", "config"},
    "evaluation": {"generation", "convert", "hf", "model", "data", "checkpoint", "ops", "platform", "config"},
    "training": {
        *("parallel", "model", "data", "checkpoint", "convert", "evaluation", "planning", "ops", "config", "platform")
    },
    "scaling": {"evaluation", "planning", "model", "platform", "config"},
    "doctor": {"config", "model", "ops", "platform", "training"},
    "cli": {"convert", "data", "evaluation", "generation", "planning", "scaling", "doctor", "platform"},
    "__main__": {"cli"},
}


def imports_of(path: Path) -> set[str]:
    """Parts of this package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "moba_megatron" and len(parts) > 1 and parts[1] != "__version__":
                found.add(parts[1])
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_keep_to_the_table():
    wrong = {}
    for path in PACKAGE.rglob("*.py"):
        part = part_of(path)
        if part == "__init__":
            continue
        outside = imports_of(path) - {part} - ALLOWED[part]
        if outside:
            wrong[str(path.relative_to(PACKAGE))] = sorted(outside)
    assert not wrong


def test_the_table_has_no_circle():
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {part for part in ALLOWED.keys() - done if ALLOWED[part] <= done}
        assert ready, f"a circle among {sorted(ALLOWED.keys() - done)}"
        done |= ready
