"""Who may import whom: never upward, never in a circle (docs/architecture.md holds the same table)."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moba_megatron"

ALLOWED = {
    "before_torch": set(),
    "config": set(),
    "errors": set(),
    "temporary": set(),
    "ops": set(),
    "hf": {"ops"},
    "platform": {"config", "temporary", "errors"},
    "runs": {"config", "temporary", "errors"},
    "parallel": {"ops"},
    "corpus": {"config", "errors"},
    "data": {"corpus", "parallel", "ops", "config"},
    "model": {"parallel", "ops", "platform", "config"},
    "checkpoint": {"runs", "platform", "config"},
    "megatron": {"model", "config"},
    "planning": {"model", "corpus", "parallel", "ops", "config", "errors"},
    "benchmark": {"planning", "hf", "parallel", "ops", "before_torch", "errors"},
    "convert": {"checkpoint", "megatron", "model", "hf", "corpus", "runs", "platform", "config", "errors"},
    "generation": {"convert", "checkpoint", "corpus", "model", "hf", "runs", "platform", "config", "errors"},
    "evaluation": {
        *("generation", "convert", "checkpoint", "data", "corpus", "model", "hf", "ops", "runs", "platform", "config"),
        *("parallel", "planning", "errors"),
    },
    "training": {
        *("evaluation", "planning", "convert", "checkpoint", "data", "corpus", "model", "parallel", "ops", "runs"),
        *("platform", "config", "errors"),
    },
    "scaling": {"planning", "model", "runs", "platform", "config", "errors"},
    "checkpoint_command": {"convert", "checkpoint", "runs", "errors"},
    "doctor": {"training", "convert", "model", "ops", "corpus", "platform", "config", "errors"},
    "cli": {
        *(
            "doctor",
            "checkpoint_command",
            "scaling",
            "benchmark",
            "planning",
            "evaluation",
            "generation",
            "convert",
            "corpus",
            "before_torch",
        ),
        "temporary",
    },
    "__main__": {"cli"},
    "train": {"training", "platform", "before_torch", "config", "errors", "temporary"},
}


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Modules of this package that a file names, wherever in the file: in imports, those for type checkers and those
    within functions among them, and in strings, as for `import_module` or a table of commands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports say where from"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"^(moba_megatron(?:\.\w+)+)(?::\w+)?$", node.value)
        found |= {module for name in names if (module := module_of(name))}
    return frozenset(found)


def module_of(name: str) -> str | None:
    """The module that a dotted name lies in or is, None outside of this package and for its top."""
    parts = name.split(".")
    while parts[0] == "moba_megatron" and len(parts) > 1:
        path = ROOT.joinpath(*parts)
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return ".".join(parts)
        parts.pop()
    return None


def files() -> dict[str, Path]:
    """All modules by dotted name, and train.py."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {**modules, "moba_megatron.train": ROOT / "train.py"}


def part_of(module: str) -> str:
    return module.split(".")[1]


def test_strings_and_imports_for_type_checkers_count(tmp_path):
    file = tmp_path / "some.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from moba_megatron.config import Config\n"
        "def work():\n    import moba_megatron.ops.layout\n"
        "COMMANDS = {'prepare': 'moba_megatron.corpus.prepare:prepare'}\n"
    )
    assert imports_of(file) == {"moba_megatron.config", "moba_megatron.ops.layout", "moba_megatron.corpus.prepare"}


def test_imports_keep_to_the_table():
    wrong = {}
    for module, path in files().items():
        if module == "moba_megatron":
            continue
        outside = {part_of(name) for name in imports_of(path)} - {part_of(module)} - ALLOWED[part_of(module)]
        if outside:
            wrong[module] = sorted(outside)
    assert not wrong


def test_the_table_allows_no_more_than_is_used():
    used: dict[str, set[str]] = {part: set() for part in ALLOWED}
    for module, path in files().items():
        if module != "moba_megatron":
            used[part_of(module)] |= {part_of(name) for name in imports_of(path)}
    unused = {part: sorted(ALLOWED[part] - names) for part, names in used.items()}
    assert {part: names for part, names in unused.items() if names} == {}


def test_the_table_has_no_circle():
    assert without_circles({part: frozenset(names) for part, names in ALLOWED.items()}) == set()


def test_modules_import_each_other_in_no_circle():
    modules = {module: imports_of(path) - {module} for module, path in files().items()}
    # A package's own page names what is in it; its modules do not ask the page.
    modules = {
        module: {name for name in names if not module.startswith(f"{name}.")} for module, names in modules.items()
    }
    assert without_circles(modules) == set()


def without_circles(graph: dict[str, frozenset[str] | set[str]]) -> set[str]:
    """What is left of a graph when everything that needs nothing of the rest is taken out, again and again."""
    left = set(graph)
    while ready := {name for name in left if not (graph[name] & left) - {name}}:
        left -= ready
    return left
