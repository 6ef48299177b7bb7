"""The export that brings its attention along, for users of transformers who do not install this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moba_megatron.config import ConfigError

CODE_FILE = "modeling_moba.py"
KEYS_FILE = "modeling_moba_keys.py"
ROUTER_FILE, INDEX_FILE = "modeling_moba_router.py", "modeling_moba_index.py"
_SOURCES = {
    CODE_FILE: "convert.portable_modeling",
    KEYS_FILE: "convert.portable_key_convolution",
    ROUTER_FILE: "hf.block_router",
    INDEX_FILE: "convert.portable_block_router",
}


def with_own_code(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The contents of config.json that name the files of code, and those files: `CODE_FILE`, where keys are convolved
    `KEYS_FILE`, and where an index chooses blocks `ROUTER_FILE` and `INDEX_FILE`.

    The architecture gets its own name. So an engine that selects models by name refuses it instead of running it with
    full attention.

    Raises:
        ConfigError: a model without MoBA layers, which any engine runs as it is.
    """
    if "moba_config" not in values:
        raise ConfigError(["--self-contained: no layer uses MoBA, so no code is needed: leave the option out"])
    family, (plain,) = values["model_type"], values["architectures"]
    convolved = "key_convolution" in values["moba_config"]
    indexed = values["moba_config"].get("router", "own") == "index"
    names = [CODE_FILE, *[KEYS_FILE] * convolved, *[ROUTER_FILE, INDEX_FILE] * indexed]
    own = f"{'Indexed' if indexed else ''}{'Convolved' if convolved else ''}MoBA{plain}"
    entry = f"{Path(names[-1]).stem}.{own}"
    return {
        **values,
        "architectures": [own],
        "auto_map": {"AutoModelForCausalLM": entry},
    }, {name: _code(name, family, plain, convolved) for name in names}


def _code(name: str, family: str, plain: str, convolved: bool) -> str:
    """A file of code for a family: the text of a module here, which is for Llama."""
    package = Path(__file__).parents[1]
    code = (package / f"{_SOURCES[name].replace('.', '/')}.py").read_text(encoding="utf-8")
    if name == INDEX_FILE and convolved:
        code = code.replace(_SOURCES[CODE_FILE], _SOURCES[KEYS_FILE]).replace("MoBALlama", "ConvolvedMoBALlama")
    code = code.replace("models.llama.modeling_llama", f"models.{family}.modeling_{family}")
    code = code.replace("LlamaForCausalLM", plain)
    code = code.replace("LlamaAttention", plain.replace("ForCausalLM", "Attention"))
    for file, module in _SOURCES.items():
        code = code.replace(f"from {package.name}.{module} import", f"from .{Path(file).stem} import")
    return code
