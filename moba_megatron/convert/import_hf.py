"""A Hugging Face folder becomes a run folder: one checkpoint, at step 0, and a configuration to go on from.

The checkpoint is an ordinary one, so everything that takes a run also takes an imported model: evaluation, generation,
export, and `model.init_from` of another run. bf16 weights stay bf16, everything else becomes fp32; values do not
change.

This runs as one process that holds the whole model. A model too large for that is trained without this step:
`model.init_from` takes the Hugging Face folder itself, and each rank reads its own part.
"""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moba_megatron import __version__
from moba_megatron.checkpoint import CheckpointWriter, Manifest
from moba_megatron.checkpoint.state import sharded_model
from moba_megatron.config import Config, ConfigError, ModelConfig, config_from_dict
from moba_megatron.config.huggingface import model_section, read_huggingface_config
from moba_megatron.convert.export_digests import check_export
from moba_megatron.convert.half_precision import F16, half_precision_note
from moba_megatron.convert.origin import keep_origin
from moba_megatron.convert.publish import check_unused, new_folder
from moba_megatron.convert.safetensors_folder import SafetensorsFolder
from moba_megatron.convert.tokenizer_files import copy_tokenizer_files
from moba_megatron.convert.upcycle import Upcycling, description, mixture_of, read_upcycled
from moba_megatron.convert.weights import open_weights, read_weights
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.hf.settings import MoBASettings
from moba_megatron.model.builder import build_model
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.platform.start import start_single_rank
from moba_megatron.runs.folder import RunFolder

NO_TOKENIZER = "none"
_HEAD = """# A start for training from {source}.
# Set data.train (prepared with the tokenizer below), data.sequence_length, the attention and the optimizer:
#   python train.py {path} run.dir={run} data.train=PREFIX data.sequence_length=32768 attention.kind=moba
"""


def import_huggingface(
    source: Path,
    out: Path,
    *,
    verify: bool = True,
    upcycling: Upcycling | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Config, list[str]]:
    """Import a model. Starts this process as a single rank.

    Args:
        source: a Hugging Face folder with safetensors.
        out: the run folder to make: `config.yaml`, `tokenizer/`, `checkpoints/step_0/`, and `origin.json` where a
            name or a license of the source is known. It appears when it is complete.
        verify: compare the files of this package's own export with its digests.
        upcycling: make a mixture of experts of a dense model.
        advance: told parameters done and in all, after each.

    Returns:
        The written configuration, and notes about the import.

    Raises:
        ConfigError: `out` is taken, or a model that is not supported, not whole or not finite, or that no mixture is
            made of, with one line for each reason.
        CheckpointError: an export that is damaged.
    """
    check_unused(out)
    if verify:
        check_export(source)
    values = read_huggingface_config(source)
    given = ModelConfig.model_validate(model_section(values))
    mixture = mixture_of(given, upcycling) if upcycling else None
    files = SafetensorsFolder(source)
    section = model_section(values) if mixture is None else mixture.model_dump(mode="json")
    config = config_from_dict(_configuration(source, out, values, files, section))
    weights = open_weights(source, given)

    def fill(chunks: list[torch.nn.Module]) -> None:
        if upcycling is None:
            read_weights(chunks, weights, config.model, advance=advance)
        else:
            read_upcycled(chunks, weights, given, config.model, upcycling, advance=advance)

    with new_folder(out) as folder:
        fingerprint, notes = copy_tokenizer(source, folder / "tokenizer", config.model.vocab_size)
        half = F16 in files.dtypes.values()
        goes_on = write_run(folder, out, config, fill, fingerprint, source, precision="bf16" if half else None)
        keep_origin(RunFolder(folder), source)
    if mixture is not None:
        notes.append(description(mixture))
    if half:
        notes.append(f"the import keeps F16 weights unchanged in fp32. In training, {half_precision_note('bf16')}")
    return goes_on, notes


def write_run(
    folder: Path,
    out: Path,
    config: Config,
    fill: Callable[[list[torch.nn.Module]], None],
    fingerprint: str,
    source: Path,
    precision: str | None = None,
) -> Config:
    """Write `checkpoints/step_0` and `config.yaml` of an imported model. Starts this process as a single rank.

    Args:
        folder: where to write.
        out: the name that the folder will have.
        fill: puts the weights into the model's chunks.
        fingerprint: of the tokenizer.
        source: what was imported.
        precision: to go on in. Default: that of the import.

    Returns:
        the configuration that was written: a start for training.
    """
    _write_checkpoint(RunFolder(folder).checkpoints, config, fill, fingerprint)
    model = config.model.model_copy(update={"init_from": str(out.resolve())})
    training = config.training.model_copy(update={"precision": precision or config.training.precision})
    goes_on = config.model_copy(update={"model": model, "training": training})
    words = shlex.quote(str(RunFolder(out).config)), shlex.quote(config.run.dir)
    head = _HEAD.format(source=source, path=words[0], run=words[1])
    RunFolder(folder).config.write_text(head + goes_on.to_yaml(), encoding="utf-8")
    return goes_on


def _write_checkpoint(
    folder: Path, config: Config, fill: Callable[[list[torch.nn.Module]], None], fingerprint: str
) -> None:
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    start_single_rank(config.run.seed)
    chunks = build_model(config, config.model.vocab_size, schedule)
    fill(chunks)
    libraries = ("torch", "megatron-core")
    manifest = Manifest(
        step=0,
        consumed_samples=0,
        config=config.model_dump(mode="json"),
        schedule=schedule.to_dict(),
        data={"tokenizer": fingerprint},
        versions={"moba-megatron": __version__, **{name: importlib.metadata.version(name) for name in libraries}},
    )
    writer = CheckpointWriter(folder, keep=1, asynchronous=False)
    writer.save(_WeightsAlone(chunks), manifest)
    writer.wait()


def attention_section(values: dict[str, Any]) -> dict[str, Any]:
    """The `attention` section of a Hugging Face configuration: full, unless it has a `moba_config`.

    Raises:
        ConfigError: a `moba_config` that cannot be read, or that no such section says.
    """
    moba = values.get("moba_config")
    if moba is None:
        return {"kind": "full"}
    try:
        settings = MoBASettings.from_entry(moba, values["num_hidden_layers"])
    except ValueError as error:
        raise ConfigError([f"config.json: {error}"]) from error
    if settings.key_convolution:
        raise ConfigError([
            f"config.json: moba_config has key_convolution = {settings.key_convolution}, whose filters cannot be read "
            f"from Hugging Face folders: start from the exported run or checkpoint"
        ])  # fmt: skip
    full = [number for number, kind in enumerate(settings.layer_types, start=1) if kind == "full"]
    own: dict[int, dict[str, Any]] = {
        number + 1: {"block_size": size, "top_k": top_k} for number, (size, top_k) in settings.layer_sizes.items()
    }
    for number, kind in enumerate(settings.layer_types):
        layer = settings.of_layer(number)
        if kind == "moba" and layer.selection.budgets is not None:
            own.setdefault(number + 1, {})["top_k"] = list(layer.selection.budgets)
    for number in settings.layer_selections:
        own.setdefault(number + 1, {}).update(_own_choice(settings, number))
    section = {"kind": "moba", "block_size": settings.block_size, "top_k": settings.top_k}
    if settings.index is not None:
        section |= {"router": "index", **settings.index}
    return {**section, **_selection_section(settings), "full_layers": full, "layers": own}


def _selection_section(settings: MoBASettings) -> dict[str, Any]:
    """What of the `attention` section says how blocks are chosen; nothing where it is top-k of the means."""
    chosen = [settings.selection, *settings.layer_selections.values()]
    if all(selection.is_plain for selection in chosen):
        return {}
    # All layers share one sharing of heads, if their selector needs it.
    shares = {selection.share_selection for selection in chosen if selection.uses_scores} or {"none"}
    if len(shares) > 1:
        raise ConfigError([
            f"config.json: moba_config has layers of several share_selection ({', '.join(sorted(shares))}): "
            "attention.share_selection holds for all layers"
        ])  # fmt: skip
    (share,) = shares
    shared = {"share_selection": share} if share != "none" else {}
    first = settings.selection
    return {"selector": first.selector, "summary": first.summary, "threshold": first.threshold, **shared}


def _own_choice(settings: MoBASettings, number: int) -> dict[str, Any]:
    """What of a layer's settings (from 0) says how it chooses, where that is not what the section says."""
    first, own = settings.selection, settings.of_layer(number).selection
    words: dict[str, Any] = {"selector": own.selector}
    if own.uses_scores and own.summary != first.summary:
        words["summary"] = own.summary
    if own.threshold is not None and own.threshold != first.threshold:
        words["threshold"] = own.threshold
    return words


def _configuration(
    source: Path, out: Path, values: dict[str, Any], weights: SafetensorsFolder, section: dict[str, Any]
) -> dict[str, Any]:
    return start_of_training(
        out,
        model={**section, "init_from": str(source.resolve())},
        attention=attention_section(values),
        sequence_length=values["max_position_embeddings"],
        exact="bf16" if set(weights.dtypes.values()) == {"BF16"} else "fp32",
    )


def start_of_training(
    out: Path, *, model: dict[str, Any], attention: dict[str, Any], sequence_length: int, exact: str
) -> dict[str, Any]:
    """Configuration values of an imported model, to start a training from.

    Args:
        out: its run folder.
        model, attention: these sections.
        exact: the precision that keeps every bit of the weights.
    """
    name = out.name
    return {
        # Not the folder itself, whose checkpoint is not a state of a training.
        "run": {"dir": f"runs/{name}-trained"},
        "model": model,
        "attention": attention,
        "data": {
            "train": f"data/prepared/{name}/train",
            "tokenizer": str(out.resolve() / "tokenizer"),
            "sequence_length": sequence_length,
        },
        "training": {"steps": 1000, "global_batch_size": 8, "precision": exact, "recompute": "full"},
        "optimizer": {"lr": 1e-5, "min_lr": 1e-6, "warmup_steps": 50},
    }


def copy_tokenizer(source: Path, folder: Path, vocab_size: int) -> tuple[str, list[str]]:
    """Copy the tokenizer's files; its fingerprint, and what is missing of it."""
    folder.mkdir()
    copy_tokenizer_files(source, folder)
    try:
        tokenizer = Tokenizer(folder)
    except ValueError as error:
        why = f"no tokenizer was imported ({error})".replace(str(folder), str(source))
        return NO_TOKENIZER, [f"{why}: evaluation and generation need one"]
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            [
                f"{source}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but vocab_size = {vocab_size}: "
                "take the model's own tokenizer, or give the model these ids (resize_token_embeddings, save_pretrained)"
            ]
        )
    return tokenizer.fingerprint, []


class _WeightsAlone:
    """A training state without optimizer, for the checkpoint writer."""

    def __init__(self, model: list[torch.nn.Module]):
        self.model = model

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        return sharded_model(self.model)
