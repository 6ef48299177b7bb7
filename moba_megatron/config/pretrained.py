"""`model.init_from` fills the `model` section: keys that a configuration leaves out come from the source model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moba_megatron.config.checks import ConfigError
from moba_megatron.config.huggingface import model_section, read_huggingface_config
from moba_megatron.config.model import ModelConfig
from moba_megatron.config.overrides import MISSING
from moba_megatron.config.paths import counted_from
from moba_megatron.config.reading import read_json_object, read_plain_yaml

# Written configurations of earlier versions are complete without these.
YOUNGER = {
    *("max_position_embeddings", "export_as", "rotary_percent", "no_rope_freq", "rotary_beta_fast"),
    *("rotary_beta_slow", "rotary_truncate", "rotary_mscale", "rotary_mscale_all_dim"),
    *(name for name in ModelConfig.model_fields if "moe_" in name),
}


def with_pretrained_model(values: dict[str, Any]) -> dict[str, Any]:
    """Configuration values whose `model` section is completed from the folder `model.init_from`.

    The folder is not read if the section is complete, as in every written configuration: the folder may be gone by
    then.

    Raises:
        ConfigError: weights cannot come from this folder.
    """
    model = values.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("init_from"), str):
        return values
    if model["init_from"] == MISSING:
        return values
    missing = set(ModelConfig.model_fields) - model.keys()
    if not missing:
        return values
    try:
        source = pretrained_model_section(model["init_from"])
    except ConfigError:
        if missing <= YOUNGER:
            return values
        raise
    if model.get("num_moe_experts") and not source.get("num_moe_experts"):
        # Not what its exports are called is wrong then: the weights are (`convert.initial`).
        source.pop("export_as", None)
    if model.get("rotary_scaling") == "yarn" and source.get("rotary_scaling", "none") != "yarn":
        source = _before_yarn(source)
    return {**values, "model": {**source, **model}}


def _before_yarn(source: dict[str, Any]) -> dict[str, Any]:
    """Settings that a `model` section with `yarn` takes from one without it: the factor on queries and keys is another,
    and the original length is the one that the source was made for."""
    kept = {key: value for key, value in source.items() if key != "rotary_attention_factor"}
    if source.get("rotary_scaling", "none") in ("none", "linear") and source.get("max_position_embeddings"):
        kept["rotary_original_length"] = source["max_position_embeddings"]
    return kept


def pretrained_model_section(folder: str | Path) -> dict[str, Any]:
    """The `model` section of a Hugging Face folder, of a checkpoint folder or of a run folder.

    Raises:
        ConfigError: it is another kind of folder, or a model that is not supported.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return model_section(read_huggingface_config(folder))
    if (folder / "checkpoint.json").is_file():
        path = folder / "checkpoint.json"
        config = read_json_object(path, "copy the checkpoint again").get("config")
    elif (folder / "config.yaml").is_file():
        path = folder / "config.yaml"
        config = read_plain_yaml(path)
    else:
        raise ConfigError([
            f"model.init_from = {folder} is not a Hugging Face folder (config.json), run folder (config.yaml) or "
            f"checkpoint (checkpoint.json){counted_from(folder)}"
        ])  # fmt: skip
    section = config.get("model") if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise ConfigError([f"model.init_from = {folder}: {path} describes no model: it is damaged; copy it again"])
    data = config.get("data")
    length = data.get("sequence_length") if isinstance(data, dict) else None
    given = section.get("max_position_embeddings")
    if any(number is not None and not isinstance(number, int) for number in (length, given)):
        raise ConfigError([f"model.init_from = {folder}: {path} has lengths that are not numbers: copy it again"])
    trained = length or 0
    window = max(section.get("max_position_embeddings") or 0, trained) or None
    return {**{key: value for key, value in section.items() if key != "init_from"}, "max_position_embeddings": window}
