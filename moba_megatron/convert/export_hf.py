"""A checkpoint becomes a Hugging Face folder: weights, configuration, tokenizer, generation settings and a model card.

This needs no GPU, no process group and no model in memory: parameters are read one by one from the checkpoint, whatever
layout it was trained at, cut into Hugging Face tensors and written in files of limited size, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moba_megatron import __version__
from moba_megatron.checkpoint import CheckpointError
from moba_megatron.checkpoint.manifest import NAME as MANIFEST
from moba_megatron.checkpoint.manifest import digest_file
from moba_megatron.config import ModelConfig
from moba_megatron.config.families import FAMILIES
from moba_megatron.convert.export_digests import write_source
from moba_megatron.convert.exported import Exported
from moba_megatron.convert.families import family_of, huggingface_config, moba_config
from moba_megatron.convert.mapping import parameter_shapes, pieces
from moba_megatron.convert.model_card import model_card
from moba_megatron.convert.piece import Arrangement, Piece
from moba_megatron.convert.publish import check_unused, new_folder
from moba_megatron.convert.safetensors_folder import INDEX, SINGLE
from moba_megatron.convert.self_contained import with_own_code
from moba_megatron.convert.stored import StoredWeights
from moba_megatron.convert.tokenizer_files import (
    complete_tokenizer_config,
    copy_tokenizer_files,
    special_ids,
    tokenizer_class,
)

SHARD_BYTES = 4 * 10**9
CONFIG = "config.json"


def export_huggingface(
    exported: Exported,
    out: Path,
    *,
    decode: str = "full",
    self_contained: bool = False,
    length: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = True,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> str | None:
    """Write the Hugging Face folder `out`, which appears when it is complete.

    Args:
        decode: how new tokens attend to a cache, `full` or `moba`; goes into `moba_config`.
        self_contained: add the attention as a file of Python that transformers runs with `trust_remote_code=True`.
        length: tokens that the model can take, for `max_position_embeddings`. Default: what it was trained on, or what
            the model that it started from was made for, if that is more.
        shard_bytes: largest file of weights. Twice as much memory is used, or twice that of the largest tensor.
        verify: compare the checkpoint's files with their digests, according to its `checkpoint.verify`; False: never.
        advance: told parameters done and in all, after each.

    Returns:
        The class of transformers that reads the tokenizer as it is meant, if there is a tokenizer.

    Raises:
        ConfigError: `out` is taken, no plain model of transformers computes this one (convolved keys need
            `self_contained`) or no class of it reads the tokenizer, or `self_contained` without MoBA layers.
        CheckpointError: the checkpoint is damaged, not finite, lacks parameters of the model, or has others.
    """
    check_unused(out)
    if not self_contained:
        exported.check_plain()
    exported.check_files(digests=verify)
    stored = StoredWeights(exported.checkpoint)
    width = exported.key_convolution
    _check_parameters(exported, stored, parameter_shapes(exported.model, width, exported.stored_indexes))
    shapes = parameter_shapes(exported.model, width, exported.indexes)
    moba = moba_config(exported.layers, decode, width, exported.indexes)
    special = special_ids(exported.tokenizer) if exported.tokenizer else {}
    values = huggingface_config(
        exported.model,
        length=length or exported.config.window,
        dtype=stored.dtype(),
        moba=moba,
        special_ids=special,
    )
    code: dict[str, str] = {}
    if self_contained:
        values, code = with_own_code(values)
    with new_folder(out) as folder:
        for name, text in code.items():
            (folder / name).write_text(text, encoding="utf-8")
        _write_json(folder / CONFIG, values)
        reader = None
        if exported.tokenizer:
            copy_tokenizer_files(exported.tokenizer.folder, folder)
            complete_tokenizer_config(folder, exported.tokenizer.eod_token)
            reader = tokenizer_class(folder, exported.tokenizer)
        _write_weights(folder, stored, shapes, exported.model, shard_bytes, advance)
        if not (folder / "generation_config.json").exists():
            _write_json(folder / "generation_config.json", {**special, "do_sample": False})
        (folder / "README.md").write_text(model_card(out.name, exported, values, reader), encoding="utf-8")
        write_source(folder, source_of(exported))
    return reader


def source_of(exported: Exported) -> dict[str, Any]:
    """What an export says of its source: the step, and a digest that no other checkpoint has."""
    digest = digest_file(exported.checkpoint / MANIFEST)["blake2b"]
    return {"step": exported.manifest.step, "checkpoint_blake2b": digest, "moba-megatron": __version__}


def _check_parameters(exported: Exported, stored: StoredWeights, shapes: dict[str, Any]) -> None:
    problems = stored.problems(shapes, exported.model)
    if problems:
        raise CheckpointError(f"{exported.checkpoint} does not match its configuration: {'; '.join(problems)}")


def _write_weights(
    folder: Path,
    stored: StoredWeights,
    shapes: dict[str, tuple[int, ...]],
    model: ModelConfig,
    shard_bytes: int,
    advance: Callable[[int, int], None],
) -> None:
    """Write numbered files as the tensors come, then give them their names and write the index."""
    shard: dict[str, torch.Tensor] = {}
    files: list[list[str]] = []
    total = 0

    def flush() -> None:
        if shard:
            file = folder / f"{len(files)}.safetensors"
            save_file(shard, file, metadata={"format": "pt"})
            # It comes readable by its owner alone, whatever the umask.
            shutil.copymode(folder / CONFIG, file)
            files.append(list(shard))
            shard.clear()

    for number, (name, shape) in enumerate(shapes.items(), start=1):
        for source, tensor in _huggingface_tensors(name, stored.read(name, shape), model).items():
            if sum(map(_bytes, shard.values())) + _bytes(tensor) > shard_bytes:
                flush()
            shard[source] = tensor
            total += _bytes(tensor)
        advance(number, len(shapes))
    flush()
    if len(files) == 1:
        (folder / "0.safetensors").rename(folder / SINGLE)
        return
    index: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        index |= dict.fromkeys(names, file)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _huggingface_tensors(name: str, parameter: torch.Tensor, model: ModelConfig) -> dict[str, torch.Tensor]:
    """A whole parameter, cut into the Hugging Face tensors that it is made of."""
    parts: dict[str, list[Piece]] = {}
    for piece in pieces(name, model, arrangement=Arrangement.of(FAMILIES[family_of(model)])):
        parts.setdefault(piece.source, []).append(piece)
    # Only tensors that are not a parameter as it is are copied.
    whole = sum(map(len, parts.values())) == 1
    return {
        source: parameter[found[0].here or ...]
        if whole
        else torch.cat([parameter[piece.here] for piece in sorted(found, key=lambda piece: piece.there[0].start)])
        for source, found in parts.items()
    }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
