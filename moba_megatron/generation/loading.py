"""Load a model from a path, in one of two forms.

`open_model` gives a checkpoint's model as it trains, in megatron-core: for losses, routing and scores.

`load_generator` gives a model that generates: from a Hugging Face folder, or from a checkpoint, whose weights move into
the same model of transformers in memory. There is one decoding engine, so a checkpoint and its export generate the same
text.

Prompts and ends of texts follow transformers in both cases. A prompt gets the tokens that the tokenizer's template puts
before a text (a token for its beginning, or none). A text ends at the tokens of the generation settings, or at the
end-of-document token of training. A checkpoint has the same tokenizer and settings as its export.

A folder with a `config.json` is a Hugging Face folder, any other a run folder or a checkpoint. Weights keep their
dtype, and go to the GPU if there is one.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from moba_megatron.checkpoint import load_model
from moba_megatron.checkpoint.find import find_checkpoint
from moba_megatron.checkpoint.finite import list_of_names, not_finite
from moba_megatron.checkpoint.manifest import CheckpointError, Manifest, NotFinite
from moba_megatron.config import Config, ParallelConfig
from moba_megatron.config.families import FAMILIES
from moba_megatron.convert.export_digests import check_export
from moba_megatron.convert.exported import Exported, open_exported
from moba_megatron.convert.families import family_of, huggingface_config, moba_config
from moba_megatron.convert.mapping import parameter_shapes, pieces
from moba_megatron.convert.piece import Arrangement
from moba_megatron.convert.run_inputs import found_config
from moba_megatron.convert.safetensors_folder import SafetensorsFolder
from moba_megatron.convert.stored import StoredWeights
from moba_megatron.convert.tokenizer_files import complete_tokenizer_config, copy_tokenizer_files
from moba_megatron.corpus.tokenizer import text_start
from moba_megatron.hf import NAME, MoBASettings, check_attends
from moba_megatron.model.builder import build_model
from moba_megatron.model.core_attention import set_attention_stage
from moba_megatron.model.exchange_choice import resolve_exchange
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.platform.start import start_command, start_single_rank
from moba_megatron.runs.folder import RunFolder


@dataclass
class OpenedModel:
    """A model in evaluation mode that attends as at its last training step, and where it came from. `model` is this
    rank's part of it."""

    model: list[torch.nn.Module]
    config: Config
    schedule: AttentionSchedule
    step: int
    checkpoint: Path
    device: torch.device

    @property
    def folder(self) -> RunFolder:
        """The run folder that the checkpoint lies in."""
        return RunFolder.of(self.checkpoint)


@dataclass(frozen=True)
class Generator:
    """A model in evaluation mode and its tokenizer.

    Attributes:
        model: a causal language model of transformers.
        encode: token ids of a prompt, with what the tokenizer's template puts before it.
        decode: text of token ids, without special tokens.
        stop_ids: tokens that end a text.
        attention: how the layers attend, in a line.
    """

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    stop_ids: Collection[int]
    attention: str


def open_model(
    path: str | Path,
    tokenizer_fingerprint: str,
    vocab_size: int,
    *,
    verify: bool = True,
    parallel: ParallelConfig | None = None,
) -> OpenedModel:
    """Start this process as a rank and load its part of a model into it: the whole of it, whatever launcher's variables
    are around, unless this is one of several. Collective.

    Args:
        tokenizer_fingerprint: of the tokenizer that is at hand.
        vocab_size: size of that tokenizer, used where the configuration leaves `model.vocab_size` to it.
        verify: compare the files with their digests, according to `checkpoint.verify` of the run; False: never.
        parallel: the layout, which fits the number of processes; None: one rank.

    Raises:
        ValueError: several processes and no layout for them.
        CheckpointError: no complete checkpoint there, a damaged one, one that is not finite, or one that was trained
            with another tokenizer.
    """
    checkpoint = find_checkpoint(path)
    config = found_config(checkpoint)
    trained_with = Manifest.read(checkpoint).data["tokenizer"]
    if trained_with != tokenizer_fingerprint:
        raise CheckpointError(
            f"{checkpoint} was trained with the tokenizer of fingerprint {trained_with}, but "
            f"{config.data.tokenizer} has {tokenizer_fingerprint}: put the old one into "
            f"{RunFolder.of(checkpoint).tokenizer}"
        )
    if parallel is None:
        device = start_single_rank(config.run.seed)
    else:
        config = config.model_copy(update={"parallel": parallel})
        device = start_command(parallel, seed=config.run.seed, context_levels=resolve_exchange(config).levels)
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    model = build_model(config, config.model.vocab_size or vocab_size, schedule)
    step = load_model(checkpoint, model, check_files=verify and config.checkpoint.verify).step
    set_attention_stage(model, schedule, schedule.stage_at(max(step, 1), config.training.steps))
    for chunk in model:
        chunk.eval()
    return OpenedModel(model, config, schedule, step, checkpoint, device)


def load_generator(path: Path, decode: str | None = None, *, verify: bool = True) -> Generator:
    """Load a model that generates text.

    Args:
        path: a Hugging Face folder, a run folder (its newest checkpoint is used) or a checkpoint folder.
        decode: `full` or `moba`, how new tokens attend in MoBA layers; None: as `config.json` says, `full` for a
            checkpoint.
        verify: compare the files with their digests: of a checkpoint if `checkpoint.verify` of its run says so; of this
            package's own export, weights and vocabulary. False: never.

    Raises:
        ValueError: a decode mode for a model without MoBA layers.
        CheckpointError, ConfigError: nothing there that can be loaded: damaged, or not finite.
        OSError: no tokenizer or weights in a Hugging Face folder.
    """
    if (path / "config.json").is_file():
        return _from_huggingface(path, decode, verify)
    return _from_checkpoint(open_exported(path), decode, verify)


def load_huggingface(path: Path, decode: str | None = None, *, verify: bool = True) -> tuple[Any, str]:
    """The model of a Hugging Face folder in evaluation mode, and how its layers attend in a line.

    Args:
        decode, verify: as in `load_generator`.

    Raises:
        ValueError: as `load_generator`, and where the model would attend by something else than its configuration says.
        CheckpointError, ConfigError: no weights, or they are damaged, pickled or not finite.
    """
    if verify:
        check_export(path)
    # Its index is followed by transformers without a look at where it leads.
    SafetensorsFolder(path)
    # Code in the folder is never run.
    local: dict[str, Any] = {"trust_remote_code": False}
    config = AutoConfig.from_pretrained(path, **local)
    attention, name = _set_attention(config, decode, str(path))
    model = AutoModelForCausalLM.from_pretrained(
        path, config=config, attn_implementation=name, dtype="auto", use_safetensors=True, **local
    )
    if names := not_finite(model.named_parameters()):
        raise NotFinite(f"{path} holds weights that are not finite (infinite or NaN): {list_of_names(names)}")
    model = _ready(model)
    if name == NAME:
        check_attends(model)
    return model, attention


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a Hugging Face folder: `tokenizer.json` as it is, because AutoTokenizer builds another one
    around its vocabulary for some kinds of models (Qwen 2), with other ids.

    Raises:
        OSError: there is none.
    """
    if (path / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_training_tokenizer(folder: Path, eod_token: str) -> Any:
    """A tokenizer of training as transformers has it after an export.

    Args:
        eod_token: the token that ended documents.
    """
    with tempfile.TemporaryDirectory() as exported:
        copy_tokenizer_files(folder, Path(exported))
        complete_tokenizer_config(Path(exported), eod_token)
        return load_tokenizer(Path(exported))


def _from_huggingface(path: Path, decode: str | None, verify: bool) -> Generator:
    tokenizer = load_tokenizer(path)
    model, attention = load_huggingface(path, decode, verify=verify)
    return _generator(model, tokenizer, attention)


def _from_checkpoint(exported: Exported, decode: str | None, verify: bool) -> Generator:
    if exported.tokenizer is None:
        raise ValueError(f"{exported.checkpoint} has no tokenizer: export it, and put a tokenizer into that folder")
    exported.check_files(digests=verify)
    folder = exported.tokenizer.folder
    tokenizer = load_training_tokenizer(folder, exported.tokenizer.eod_token)
    stored = StoredWeights(exported.checkpoint)
    dtype = stored.dtype()
    values = huggingface_config(
        exported.model,
        length=exported.config.window,
        dtype=dtype,
        moba=moba_config(exported.layers, decode or "full", indexes=exported.indexes),
        special_ids={"eos_token_id": exported.tokenizer.eod_id},
    )
    config = AutoConfig.for_model(**values)
    attention, name = _set_attention(config, decode, str(exported.checkpoint))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=dtype)
    _fill(model, stored, exported)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return _generator(_ready(model), tokenizer, attention)


def _generator(model: Any, tokenizer: Any, attention: str) -> Generator:
    start = text_start(tokenizer)
    stop = {*_as_list(model.generation_config.eos_token_id), *_as_list(model.config.eos_token_id)}
    return Generator(
        model=model,
        encode=lambda text: [*start, *tokenizer(text, add_special_tokens=False).input_ids],
        decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
        stop_ids=sorted(stop),
        attention=attention,
    )


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


@torch.no_grad()
def _fill(model: Any, stored: StoredWeights, exported: Exported) -> None:
    """Copy a checkpoint's weights into a model of transformers, one parameter at a time."""
    parameters = dict(model.named_parameters())
    arrangement = Arrangement.of(FAMILIES[family_of(exported.model)]).found_in(parameters)
    for name, shape in parameter_shapes(exported.model, indexes=exported.indexes).items():
        parameter = stored.read(name, shape)
        for piece in pieces(name, exported.model, arrangement=arrangement):
            target = parameters[piece.source]
            # Without slices the whole of one is the whole of the other.
            target[piece.there or ...] = parameter[piece.here or ...]


def _set_attention(config: Any, decode: str | None, path: str) -> tuple[str, str]:
    """Set the decode mode; how the layers attend in a line, and the name of the attention."""
    if getattr(config, "moba_config", None) is None:
        if config._attn_implementation == NAME:
            raise ValueError(f"{path} names the attention {NAME!r} but has no moba_config: export it again")
        if decode is not None:
            raise ValueError(f"{path} has no MoBA layers, so there is no decode mode: leave --decode out")
        return "full attention in all layers", "sdpa"
    if decode is not None:
        config.moba_config = {**copy.deepcopy(config.moba_config), "decode": decode}
    settings = MoBASettings.from_config(config)
    sparse = settings.layer_types.count("moba")
    line = (
        f"MoBA in {sparse} of {len(settings.layer_types)} layers, block_size = {settings.block_size}, "
        f"top_k = {settings.selection.blocks(settings.top_k)}{_words(settings)}{_other_layers(settings)}, "
        f"decode = {settings.decode}"
    )
    return line, NAME


def _words(settings: MoBASettings) -> str:
    alike = settings.selection.with_one_budget
    return "" if alike.is_plain else f", {alike}"


def _other_layers(settings: MoBASettings) -> str:
    """Layers that differ from the others in size or in how they choose blocks."""
    numbers = sorted({*settings.layer_sizes, *settings.layer_selections})
    own = []
    for number in numbers:
        layer = settings.of_layer(number)
        chosen = f", {layer.selection.with_one_budget}" if number in settings.layer_selections else ""
        own.append(f"{layer.block_size}, {layer.selection.blocks(layer.top_k)}{chosen} in layer {number + 1}")
    return f" ({'; '.join(own)})" if own else ""


def _ready(model: Any) -> Any:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
