"""Files of settings as plain values. Any problem becomes a `ConfigError` that names the file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moba_megatron.config.checks import ConfigError

_MOST_VALUES = 200_000
"""A larger file is not a settings file: a few lines of aliases (`*name`) can stand for any number of values."""


def text_of(path: str | Path, fix: str = "save it as UTF-8") -> str:
    """The text of a file.

    Raises:
        ConfigError: it is not UTF-8.
        OSError: it cannot be read; the error names it.
    """
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path} is not UTF-8 (byte {error.start} is {data[error.start]:#04x}): {fix}"]) from error


def read_tree(path: str | Path) -> Any:
    """A YAML file by OmegaConf's rules (1e-3 is a number, a key may stand once), references (`${...}`) as they stand.

    Raises:
        ConfigError: not YAML, nested too deep, or too large.
        OSError: it cannot be read.
    """
    text = text_of(path)
    with settings_of(path):
        if isinstance(_refuse_huge(text, path), yaml.ScalarNode):  # OmegaConf takes a word for a key
            raise ConfigError([f"{path} must hold a mapping or a list, not one value"])
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))


def read_plain_yaml(path: str | Path) -> Any:
    """A YAML file by PyYAML's rules. Raises as `read_tree`."""
    text = text_of(path)
    with settings_of(path):
        _refuse_huge(text, path)
        return yaml.safe_load(text)


def read_json_object(path: str | Path, fix: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        fix: what to do about a damaged one.

    Raises:
        ConfigError: it does not.
        OSError: it cannot be read.
    """
    text = text_of(path, fix)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise ConfigError([f"{path} is damaged: {why}; {fix}"]) from error
    if not isinstance(found, dict):
        raise ConfigError([f"{path} is damaged: it does not hold an object; {fix}"])
    return found


@contextmanager
def settings_of(path: str | Path) -> Iterator[None]:
    """Turn errors of the YAML libraries into a `ConfigError` that names the file."""
    try:
        yield
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        raise ConfigError([f"{path}: {str(error).splitlines()[0]}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{path} is nested too deep to be settings: flatten it"]) from error
    except (yaml.YAMLError, ValueError, TypeError, OSError) as error:
        # OmegaConf raises OSError for what is neither a mapping nor a list.
        raise ConfigError([f"{path} is not valid YAML: {' '.join(str(error).split())}"]) from error


def _refuse_huge(text: str, path: str | Path) -> yaml.Node | None:
    """The root of a YAML file. Raises if it stands for too many values, or refers to itself."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node | None) -> int:
        if not isinstance(node, yaml.MappingNode | yaml.SequenceNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_VALUES  # an alias of a node above it
            parts = node.value
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if (found := size(root)) > _MOST_VALUES:
        raise ConfigError(
            [f"{path} stands for {found:.3g} values, too many for settings: take out its aliases (`*name`)"]
        )
    return root
