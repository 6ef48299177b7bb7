"""A configuration by what a user calls it: a file, a variant of a file, or a run of a sweep."""

from __future__ import annotations

from pathlib import Path

from moba_megatron.config.checks import ConfigError
from moba_megatron.config.load import config_from_tree, read_yaml, split_name
from moba_megatron.config.reading import read_tree
from moba_megatron.config.schema import Config
from moba_megatron.config.sweep import choices_of, run_name, run_of
from moba_megatron.config.sweep_file import read_sweep


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file with its bases, apply `key.path=value` overrides, check everything that needs no process group.

    Args:
        path: `FILE.yaml`, `FILE.yaml:VARIANT`, or `SWEEP.yaml:RUN`.

    Raises:
        ConfigError: with one line for each unknown key, wrong type or impossible combination.
    """
    file, name = split_name(path)
    if is_sweep(file):
        if name is None:
            raise ConfigError([f"{file} is a sweep: name one of its runs, {file}:RUN"])
        return run_of(file, name).with_overrides(overrides or [])
    return config_from_tree(read_yaml(Path(path)), overrides)


def names_in(path: Path) -> list[str]:
    """The runs of a sweep, or the variants of another file: `FILE:NAME` is a configuration for each."""
    if is_sweep(path):
        return [run_name(options) for options, _ in choices_of(read_sweep(path))]
    tree = read_tree(path)
    return list(tree.get("variants") or {}) if isinstance(tree, dict) else []


def is_sweep(path: Path) -> bool:
    """Whether a file holds a sweep (`config.sweep`)."""
    tree = read_tree(path) if path.is_file() else None
    return isinstance(tree, dict) and "axes" in tree
