"""`model.init_from` fills the `model` section: what a configuration leaves out is as in the model it starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from moba_megatron.config.checks import ConfigError
from moba_megatron.config.huggingface import model_section, read_huggingface_config
from moba_megatron.config.model import ModelConfig
from moba_megatron.config.overrides import MISSING
from moba_megatron.config.paths import counted_from


def with_pretrained_model(values: dict[str, Any]) -> dict[str, Any]:
    """Configuration values whose `model` section is completed from the folder `model.init_from`.

    Nothing is read where the section is complete, as in every written configuration: the folder may be gone by then.

    Raises:
        ConfigError: the folder is none that weights can come from.
    """
    model = values.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("init_from"), str):
        return values
    if model["init_from"] == MISSING:
        return values
    if set(ModelConfig.model_fields) <= model.keys():
        return values
    return {**values, "model": {**pretrained_model_section(model["init_from"]), **model}}


def pretrained_model_section(folder: str | Path) -> dict[str, Any]:
    """The `model` section of a Hugging Face folder, of a checkpoint folder or of a run folder.

    Raises:
        ConfigError: it is none of these, or a model that is not supported.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return model_section(read_huggingface_config(folder))
    if (folder / "checkpoint.json").is_file():
        section = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))["config"]["model"]
    elif (folder / "config.yaml").is_file():
        section = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["model"]
    else:
        raise ConfigError([
            f"model.init_from = {folder} is no Hugging Face folder (config.json), run folder (config.yaml) or "
            f"checkpoint (checkpoint.json){counted_from(folder)}"
        ])  # fmt: skip
    return {key: value for key, value in section.items() if key != "init_from"}
