"""A configuration by its name: a file, a variant of a file, or a run of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moba_megatron.config.checks import ConfigError
from moba_megatron.config.load import config_from_tree, read_mapping, split_name, with_bases
from moba_megatron.config.reading import read_tree
from moba_megatron.config.schema import Config
from moba_megatron.config.sweep import choices_of, run_name, run_of
from moba_megatron.config.sweep_file import sweep_of


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file with its bases, apply `key.path=value` overrides, check everything that needs no process group.

    Args:
        path: `FILE.yaml`, `FILE.yaml:VARIANT`, or `SWEEP.yaml:RUN`.

    Raises:
        ConfigError: with one line for each unknown key, wrong type or impossible combination.
    """
    file, name = split_name(path)
    tree = read_mapping(file.resolve())
    if not _is_sweep(tree):
        return config_from_tree(with_bases(file.resolve(), name, tree), overrides)
    if name is None:
        raise ConfigError([f"{file} is a sweep: name one of its runs, {file}:RUN"])
    return run_of(file, name, sweep_of(file, tree)).with_overrides(overrides or [])


def names_in(path: Path) -> list[str]:
    """The runs of a sweep, or the variants of another file: `FILE:NAME` is a configuration for each."""
    tree = read_tree(path)
    if not isinstance(tree, dict):
        return []
    if _is_sweep(tree):
        return [run_name(options) for options, _ in choices_of(sweep_of(path, tree))]
    return list(tree.get("variants") or {})


def _is_sweep(tree: dict[str, Any]) -> bool:
    return "axes" in tree
