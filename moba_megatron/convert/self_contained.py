"""The export that brings its attention along, for users of transformers who do not install this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moba_megatron.config import ConfigError

CODE_FILE = "modeling_moba.py"
_SOURCE = Path(__file__).with_name("portable_modeling.py")


def with_own_code(values: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The contents of config.json that name the file `CODE_FILE`, and the contents of that file.

    The architecture gets a name of its own, so that an engine that goes by names refuses the model instead of running
    it with full attention.

    Raises:
        ConfigError: a model without MoBA layers, which any engine runs as it is.
    """
    if "moba_config" not in values:
        raise ConfigError(["--self-contained: no layer attends by MoBA, so there is no code to bring: leave it out"])
    family, (plain,) = values["model_type"], values["architectures"]
    code = _SOURCE.read_text(encoding="utf-8")
    code = code.replace("models.llama.modeling_llama", f"models.{family}.modeling_{family}")
    code = code.replace("LlamaForCausalLM", plain)
    own = f"MoBA{plain}"
    return {
        **values,
        "architectures": [own],
        "auto_map": {"AutoModelForCausalLM": f"{Path(CODE_FILE).stem}.{own}"},
    }, code
