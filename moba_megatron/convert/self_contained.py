"""The export that brings its attention along, for users of transformers who do not install this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moba_megatron.config import ConfigError

CODE_FILE = "modeling_moba.py"
KEYS_FILE = "modeling_moba_keys.py"
_SOURCES = {CODE_FILE: "portable_modeling", KEYS_FILE: "portable_key_convolution"}


def with_own_code(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The contents of config.json that name the files of code, and those files: `CODE_FILE`, and where keys are
    convolved `KEYS_FILE`.

    The architecture gets its own name. So an engine that selects models by name refuses it instead of running it with
    full attention.

    Raises:
        ConfigError: a model without MoBA layers, which any engine runs as it is.
    """
    if "moba_config" not in values:
        raise ConfigError(["--self-contained: no layer uses MoBA, so no code is needed: leave the option out"])
    family, (plain,) = values["model_type"], values["architectures"]
    convolved = "key_convolution" in values["moba_config"]
    names = [CODE_FILE, KEYS_FILE] if convolved else [CODE_FILE]
    own = f"{'Convolved' if convolved else ''}MoBA{plain}"
    entry = f"{Path(names[-1]).stem}.{own}"
    return {
        **values,
        "architectures": [own],
        "auto_map": {"AutoModelForCausalLM": entry},
    }, {name: _code(name, family, plain) for name in names}


def _code(name: str, family: str, plain: str) -> str:
    """A file of code for a family: the text of a module here, which is for Llama."""
    code = Path(__file__).with_name(f"{_SOURCES[name]}.py").read_text(encoding="utf-8")
    code = code.replace("models.llama.modeling_llama", f"models.{family}.modeling_{family}")
    code = code.replace("LlamaForCausalLM", plain)
    code = code.replace("LlamaAttention", plain.replace("ForCausalLM", "Attention"))
    return code.replace(f"from {__package__}.{_SOURCES[CODE_FILE]} import", f"from .{Path(CODE_FILE).stem} import")
