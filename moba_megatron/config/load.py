"""Reading a configuration: defaults, then the file named by `base:`, then the file itself, then `key.path=value`
overrides.

`base:` is a path relative to the file that names it, or a list of them, later ones winning. Unknown keys, wrong types
and combinations that cannot work end as one `ConfigError` that lists every problem with its key, its value and the
mend.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from moba_megatron.config.checks import ConfigError, combination_problems
from moba_megatron.config.pretrained import with_pretrained_model
from moba_megatron.config.schema import Config
from moba_megatron.config.section import Section


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file with its bases, apply `key.path=value` overrides, check everything that needs no process group.

    Raises:
        ConfigError: with one line for each unknown key, wrong type or impossible combination.
    """
    tree = read_yaml(Path(path))
    try:
        tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(_check_overrides(overrides or [])))
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([str(error).splitlines()[0]]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"an override among {overrides} has a value that is not valid YAML: {error}"]) from error
    return config_from_dict(values)


def config_from_dict(values: dict[str, Any]) -> Config:
    """A checked `Config` from plain values, as `load_config` makes it from files.

    What the `model` section leaves out is taken from `model.init_from`, if there is one.
    """
    values = with_pretrained_model(values)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError([explain(item, Config) for item in error.errors()]) from error
    problems = combination_problems(config)
    if problems:
        raise ConfigError(problems)
    return config


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> DictConfig:
    """What a file and the files that its `base:` names say, unchecked."""
    path = path.resolve()
    if path in seen:
        raise ConfigError([f"base: {path} includes itself"])
    if not path.is_file():
        raise ConfigError([f"no such configuration file: {path}"])
    try:
        tree = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError([f"{path} is not valid YAML: {error}"]) from error
    if not isinstance(tree, DictConfig):
        raise ConfigError([f"{path} must hold a mapping of sections"])
    for key in ("parallel.exchange", "exchange"):
        exchange = OmegaConf.select(tree, key)
        if isinstance(exchange, str):
            # One word for both kinds of layers, of which an override may change one.
            OmegaConf.update(tree, key, {"moba": exchange, "full": exchange})
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, Sequence) or not all(isinstance(base, str) for base in bases):
        raise ConfigError([f"{path}: base = {bases!r} must be a path or a list of paths"])
    return OmegaConf.merge(*[read_yaml(path.parent / base, (*seen, path)) for base in bases], tree)


def _check_overrides(overrides: list[str]) -> list[str]:
    wrong = [text for text in overrides if "=" not in text or text.startswith("-")]
    if wrong:
        raise ConfigError([f"override {text!r} is not of the form key.path=value" for text in wrong])
    return overrides


def explain(error: Any, schema: type[Section]) -> str:
    """One pydantic error as `key = value: what is wrong`, with the closest name of the schema for a misspelt key."""
    location = [str(part) for part in error["loc"] if part not in ("str", "list[BlendEntry]")]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _known_keys(schema, location[:-1]), n=1, cutoff=0.5)
        hint = f"; did you mean {'.'.join([*location[:-1], near[0]])}?" if near else ""
        return f"{key}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{key}: missing, and it has no default"
    return f"{key} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _known_keys(schema: type[Section], location: list[str]) -> list[str]:
    section: Any = schema
    for name in location:
        field = getattr(section, "model_fields", {}).get(name)
        section = field.annotation if field else None
    return list(getattr(section, "model_fields", {}))
