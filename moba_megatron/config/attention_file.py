"""The attention of a model that another script builds and trains: the `attention` section without the rest.

Megatron-LM, Megatron-Bridge and the like have their own flags for model, data and optimizer. They have none for the
attention of each layer; this file has these settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moba_megatron.config.attention import AttentionConfig
from moba_megatron.config.checks import ConfigError
from moba_megatron.config.load import explain, read_yaml
from moba_megatron.config.overrides import refuse_missing, resolved
from moba_megatron.config.parallel import ExchangeConfig, ExchangeSetting
from moba_megatron.config.section import Section


class AttentionFile(Section):
    """The attention of each layer, and the exchange of context-parallel ranks."""

    attention: AttentionConfig
    """As the section `attention` of a training configuration."""
    exchange: ExchangeSetting = ExchangeConfig()
    """As `parallel.exchange` of a training configuration. `auto` is decided at the first call, from its sizes."""


def load_attention(source: str | Path | Mapping[str, Any] | AttentionConfig) -> AttentionFile:
    """Read and check the attention of a model.

    Args:
        source: a YAML file, or what one holds: `attention: {...}` and, if wanted, `exchange: ...`; or the section
            alone. `base:` names files to start from, as in a training configuration.

    Raises:
        ConfigError: no such file, an unknown key, a wrong type, an empty file; with one line for each problem.
    """
    if isinstance(source, AttentionConfig):
        return AttentionFile(attention=source)
    where = "" if isinstance(source, Mapping) else f"{source}: "
    values = dict(source) if isinstance(source, Mapping) else _values(Path(source))
    if not values:
        raise ConfigError([f"{where}no attention setting: give at least block_size and top_k, or kind"])
    if not set(values) & set(AttentionFile.model_fields):
        values = {"attention": values}
    try:
        return AttentionFile.model_validate(values)
    except ValidationError as error:
        raise ConfigError([where + explain(item, AttentionFile) for item in error.errors()]) from error


def _values(path: Path) -> dict[str, Any]:
    values = resolved(read_yaml(path))
    refuse_missing(values)
    return values
