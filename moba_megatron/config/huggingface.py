"""A Hugging Face `config.json` as our `model` section.

Supported are the rows of `families.FAMILIES`: decoders of RMSNorm, SwiGLU and rotary embedding. Everything else is
refused; the error names the key and a way forward. A model that is almost right would give plausible text and wrong
numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moba_megatron.config.checks import ConfigError
from moba_megatron.config.families import FAMILIES
from moba_megatron.config.family import MOBA_IN_TRANSFORMERS, Family, Values
from moba_megatron.config.huggingface_rope import rotary_section
from moba_megatron.config.huggingface_types import wrong_types
from moba_megatron.config.reading import read_json_object

DOWNLOAD = "hf download NAME --local-dir"
"""The command that fetches a model, up to the folder."""
# null says something here that is not the default of the family.
_MEANINGFUL_NULLS = ("sliding_window", "num_key_value_heads", "head_dim")
# The number of experts has another name in some families, which transformers 5 saves for others as well.
_SAME = "num_experts", "num_local_experts"
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def read_huggingface_config(folder: str | Path) -> Values:
    """`config.json` of a folder, with the defaults of its family filled in.

    Raises:
        ConfigError: no such file, or a model that is not supported, with one line for each reason.
    """
    path = Path(folder) / "config.json"
    given = _read(path)
    if wrong := wrong_types(given):
        raise ConfigError([f"{path}: {line}: fetch the file again ({DOWNLOAD} {folder})" for line in wrong])
    family = FAMILIES.get(given.get("model_type"))
    if family is None:
        raise ConfigError([
            f"{path}: model_type = {given.get('model_type')!r} is not one of {', '.join(FAMILIES)}: "
            f"{MOBA_IN_TRANSFORMERS}"
        ])  # fmt: skip
    one, other = _SAME
    if given.get(one) is None:
        given[one] = given.pop(other, None)
    elif given.get(other) not in (None, given[one]):
        raise ConfigError([
            f"{path}: {one} = {given[one]} and {other} = {given[other]}: keep the one that the weights have"
        ])  # fmt: skip
    values = {**family.defaults, **{key: value for key, value in given.items() if value is not None}}
    for key in _MEANINGFUL_NULLS:
        if key in given and given[key] is None:
            values.pop(key, None)
    problems = [
        f"{path}: {key} is missing: fetch the file again ({DOWNLOAD} {folder})"
        for key in _REQUIRED
        if key not in values
    ]
    # What is missing leaves nothing to look at.
    found = [] if problems else [*_unsupported(values, family), *family.problems(values)]
    problems += [f"{path}: {line}" for line in found]
    if problems:
        raise ConfigError(problems)
    return values


def family_of_folder(folder: str | Path) -> Family:
    """The family of a folder that `read_huggingface_config` takes."""
    return FAMILIES[_read(Path(folder) / "config.json")["model_type"]]


def model_section(values: Values) -> dict[str, Any]:
    """The `model` section from the result of `read_huggingface_config`.

    Raises:
        ConfigError: a rotary embedding that is not supported, or two entries that contradict each other.
    """
    heads, family = values["num_attention_heads"], FAMILIES[values["model_type"]]
    return {
        "num_layers": values["num_hidden_layers"],
        "hidden_size": values["hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": values.get("num_key_value_heads", heads),
        "kv_channels": values.get("head_dim", values["hidden_size"] // heads),
        "ffn_hidden_size": values["intermediate_size"],
        "vocab_size": values["vocab_size"],
        "max_position_embeddings": values["max_position_embeddings"],
        "export_as": values["model_type"],
        "layernorm_epsilon": values["rms_norm_eps"],
        "init_method_std": values["initializer_range"],
        "share_embeddings_and_output_weights": values["tie_word_embeddings"],
        **family.always,
        **family.section(values),
        **rotary_section(values, family),
    }


def _read(path: Path) -> Values:
    if not path.is_file():
        raise ConfigError([
            f"no config.json in {path.parent}: it is not a Hugging Face model; fetch one: {DOWNLOAD} {path.parent}"
        ])  # fmt: skip
    return read_json_object(path, f"fetch it again ({DOWNLOAD} {path.parent})")


def _unsupported(values: Values, family: Family) -> list[str]:
    """What of a model cannot be expressed here, one line each, with a way to go on."""
    named = values.get("architectures", [family.architecture])
    window = family.window(values)
    kinds = sorted(set(values.get("layer_types", [])) - {"full_attention"})
    ours = "moba_config" in values
    quantized = values.get("quantization_config", {})
    method = f" ({quantized['quant_method']})" if "quant_method" in quantized else ""
    return [
        text
        for wrong, text in [
            (
                named != [family.architecture] and not ours,
                f"architectures = {named} is not {family.architecture}: take the model for causal language modelling, "
                "or load this one by AutoModelForCausalLM and save it",
            ),
            (
                _has_own_code(values, family) and not ours,
                "auto_map names code of its own, which is never run: if the model needs no such code, take auto_map "
                "out of config.json",
            ),
            (
                "quantization_config" in values,
                f"quantization_config{method}: quantized weights are not supported: take the bf16 model of the "
                "same name",
            ),
            (
                values["hidden_act"] not in ("silu", "swish"),
                f"hidden_act = {values['hidden_act']!r}: only silu is supported; {MOBA_IN_TRANSFORMERS}",
            ),
            (
                bool(values.get("mlp_bias")),
                f"mlp_bias = true: biases in the feed-forward are not supported; {MOBA_IN_TRANSFORMERS}",
            ),
            (
                bool(values.get("attention_bias")),
                "attention_bias = true: it adds a bias to the output projection, which is not supported (Qwen 2's "
                f"biases on queries, keys and values are); {MOBA_IN_TRANSFORMERS}",
            ),
            (
                bool(values.get("lm_head_bias")),
                f"lm_head_bias = true: a bias of the output layer is not supported; {MOBA_IN_TRANSFORMERS}",
            ),
            (
                window is not None,
                f"sliding_window = {window}: attention within a window is not supported; set sliding_window: null in "
                "config.json, which changes nothing for texts within the window; for longer texts the model must be "
                "trained",
            ),
            (
                bool(kinds),
                f"layer_types has {', '.join(kinds)}: only full_attention is supported; set all of them to it, which "
                "changes nothing for texts within a layer's window",
            ),
        ]
        if wrong
    ]


def _has_own_code(values: Values, family: Family) -> bool:
    """Whether `auto_map` names code that transformers has not itself; a tokenizer's is not asked for here."""
    named = {key: value for key, value in values.get("auto_map", {}).items() if key != "AutoTokenizer"}
    return any(str(value).split("--")[-1] not in family.own_code for value in named.values())
