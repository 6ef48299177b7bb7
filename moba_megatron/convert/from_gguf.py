"""A GGUF file as a Hugging Face folder in fp32: `python -m moba_megatron.convert.from_gguf FILE.gguf OUT`.

Small models are often published as GGUF files with quantized weights. Training continues from the dequantized weights.
transformers' loader reads the files; by default it would keep weights quantized, and such a model cannot be saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from moba_megatron.config import ConfigError
from moba_megatron.convert.publish import check_unused, new_folder
from moba_megatron.errors import user_errors

_MAGIC = b"GGUF"


def from_gguf(source: Path, out: Path) -> None:
    """Write `out`, a Hugging Face folder with config.json, fp32 safetensors and the tokenizer with its chat template.

    Args:
        source: GGUF file of an architecture that transformers reads (Llama, Qwen 2 and 3, Mistral, Phi 3, ...).
        out: folder to make; nothing is overwritten.

    Raises:
        ConfigError: `source` is not a GGUF file or can't be read, `out` exists, or the package `gguf` is missing.
    """
    check_unused(out)
    if not source.is_file():
        raise ConfigError([f"{source} is not a file: give the path of a .gguf file"])
    with open(source, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ConfigError([f"{source} is not a GGUF file: it does not begin with {_MAGIC.decode()}"])
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(["GGUF files need the package gguf: pip install -e '.[real]'"]) from error
    import torch
    import transformers

    where = {"gguf_file": source.name, "local_files_only": True}
    quantization = transformers.GgufConfig(dequantize=True)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent, dtype=torch.float32, quantization_config=quantization, **where
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **where)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file ends anywhere in the reader
        said = f"{type(error).__name__}: {error}"
        raise ConfigError([f"transformers {transformers.__version__} can't read {source}: {said}"]) from error
    # The name that the file's maker gave it is not a path.
    vars(model.config).pop("_model_name_or_path", None)
    for config in (model.config, model.generation_config):
        for key, value in vars(config).items():
            setattr(config, key, _as_written(value))
    with new_folder(out) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def _as_written(value: object) -> object:
    """The decimal number that was meant by one that went through fp32, as GGUF's numbers do; others as they are.

    >>> _as_written(9.999999747378752e-06), _as_written({"rope_theta": 100000.0}), _as_written(3)
    (1e-05, {'rope_theta': 100000.0}, 3)
    """
    if isinstance(value, dict):
        return {key: _as_written(item) for key, item in value.items()}
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


@user_errors(apart=True)
def main(
    source: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="GGUF file.")],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to make; it must not exist.")],
) -> None:
    """Make a Hugging Face folder in fp32 from a GGUF file, for import-hf and model.init_from."""
    from_gguf(source, out)
    print(out)


if __name__ == "__main__":
    typer.run(main)
