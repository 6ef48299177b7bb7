"""The check of a conversion: compare the logits of our model with those of transformers, in fp32.

Weights that return bit for bit prove little: with wrong rotary metadata, a wrong epsilon or a wrong order of heads they
would still be the same. So our model, filled from the checkpoint, and transformers' model, loaded from the Hugging Face
folder, read the same tokens under full attention: random ones, real ones, and a text longer than the rotary embedding's
original length. A model with MoBA layers also reads random tokens with its own attention on both sides. The text is so
long that its last tokens leave out blocks in every MoBA layer, because up to `block_size * top_k` tokens MoBA equals
full attention.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import Exported
from moba_megatron.convert.stored import StoredWeights
from moba_megatron.convert.tokenizer_files import TEXT
from moba_megatron.convert.weights import canonical_parameters
from moba_megatron.model.builder import build_model
from moba_megatron.model.core_attention import set_attention_stage
from moba_megatron.model.schedule import FULL, AttentionSchedule
from moba_megatron.platform.start import start_single_rank
from moba_megatron.runs.folder import RunFolder

TOLERANCE = 1e-5
_COMPARED = 128
_LONGEST = 16384


@dataclass(frozen=True)
class Text:
    """Token ids [1, tokens], read under full attention or under the model's own (`moba`)."""

    name: str
    ids: Tensor
    moba: bool = False


@dataclass(frozen=True)
class Comparison:
    """One text: the largest difference between two logits of its last tokens, and the largest logit.

    Under MoBA the difference is that of the median token: where two blocks score the same up to rounding, the two
    models may choose differently, and a few tokens differ for a reason that is not an error.
    """

    name: str
    tokens: int
    difference: float
    largest: float

    @property
    def relative(self) -> float:
        """The difference in units of the largest logit, or of 1 where all are smaller."""
        return self.difference / max(1.0, self.largest)


def verify(exported: Exported, folder: Path) -> list[Comparison]:
    """Compare a checkpoint with a Hugging Face folder.

    Starts this process as a single rank, and holds both models in memory in fp32, one after the other.
    """
    texts = _texts(exported)
    ours = _our_logits(exported, texts)
    # Convolved keys are computed by code that the export brings, which was written here; no folder says so by itself.
    theirs = _their_logits(folder, texts, own_code=exported.key_convolution is not None)
    return [_compare(text, a, b) for text, a, b in zip(texts, ours, theirs, strict=True)]


def _texts(exported: Exported) -> list[Text]:
    generator = torch.Generator().manual_seed(0)
    model = exported.model

    def random(length: int) -> Tensor:
        return torch.randint(0, model.vocab_size, (1, length), generator=generator)

    texts = [Text("random tokens", random(_COMPARED))]
    if exported.tokenizer is not None and (real := exported.tokenizer.encode_batch([TEXT]))[0]:
        texts.append(Text("real tokens", torch.tensor(real)))
    scaled = model.rotary_scaling in ("llama3", "yarn", "longrope")
    original = model.rotary_original_length if scaled else exported.config.data.sequence_length
    texts.append(Text("past the original length", random(min(original + _COMPARED, _LONGEST))))
    if covered := [layer.block_size * layer.top_k for layer in exported.layers if layer.kind == "moba"]:
        shortest = max(covered) + _COMPARED
        length = max(shortest, min(shortest + max(covered), _LONGEST))
        texts.append(Text("under MoBA (median token)", random(length), moba=True))
    return texts


@torch.no_grad()
def _our_logits(exported: Exported, texts: list[Text]) -> list[Tensor]:
    """Logits [compared, vocabulary] of each text's last tokens."""
    device = start_single_rank(exported.config.run.seed)
    training = exported.config.training.model_copy(update={"precision": "fp32", "recompute": "none"})
    attention = exported.config.attention.model_copy(update={"router_loss": "none"})
    config = exported.config.model_copy(update={"model": exported.model, "training": training, "attention": attention})
    own = AttentionSchedule((exported.layers,))
    chunks = build_model(config, exported.model.vocab_size, own)
    stored = StoredWeights(exported.checkpoint)
    for name, parameter in canonical_parameters(chunks[0]):
        parameter.copy_(stored.read(name, tuple(parameter.shape)))
    model = chunks[0].eval()
    # Logits of a long text over a large vocabulary do not fit: all but the last tokens end before the output layer.
    model.output_layer.register_forward_pre_hook(lambda _, inputs: (inputs[0][-_COMPARED:], *inputs[1:]))
    logits = []
    for text in texts:
        set_attention_stage(chunks, own if text.moba else AttentionSchedule.uniform(len(exported.layers), FULL), 0)
        ids = text.ids.to(device)
        positions = torch.arange(ids.shape[1], device=device).unsqueeze(0)
        logits.append(model(ids, positions, attention_mask=None)[0].cpu())
    return logits


@torch.no_grad()
def _their_logits(folder: Path, texts: list[Text], own_code: bool) -> list[Tensor]:
    """As `_our_logits`, of a Hugging Face folder.

    Args:
        own_code: run the code that the folder brings.
    """
    from transformers import AutoModelForCausalLM

    import moba_megatron.hf  # noqa: F401  (registers the attention)

    settings = {
        "dtype": torch.float32,
        "attn_implementation": "sdpa",
        "trust_remote_code": own_code,
        "use_safetensors": True,
    }
    model = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    logits = []
    for text in texts:
        model.set_attn_implementation("moba" if text.moba else "sdpa")
        # A cache would hold keys and values of all layers, many gigabytes for a long text.
        logits.append(model(text.ids, use_cache=False, logits_to_keep=_COMPARED).logits[0])
    return logits


def _compare(text: Text, ours: Tensor, theirs: Tensor) -> Comparison:
    differences = (ours - theirs).abs().amax(-1)
    difference = differences.median() if text.moba else differences.max()
    return Comparison(text.name, text.ids.shape[1], float(difference), float(theirs.abs().max()))


def verify_own_export(console: Console, exported: Exported) -> None:
    """As `verify_conversion`, with an export of the checkpoint that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=RunFolder.of(exported.checkpoint).path.parent) as folder:
        out = Path(folder) / "export"
        export_huggingface(exported, out, verify=False)
        verify_conversion(console, exported, out)


def verify_conversion(console: Console, exported: Exported, folder: Path) -> None:
    """Compare and print it.

    Raises:
        ValueError: the logits of a text differ by more than the tolerance.
    """
    found = verify(exported, folder)
    table = Table("logits in fp32", "tokens", "largest difference", "largest logit")
    for text in found:
        table.add_row(text.name, f"{text.tokens:,}", f"{text.difference:.2e}", f"{text.largest:.2f}")
    console.print(table)
    worst = max(found, key=lambda text: text.relative)
    if worst.relative > TOLERANCE:
        raise ValueError(
            f"{folder} is not the model of {exported.checkpoint}: the logits of {worst.name} differ by "
            f"{worst.difference:.2e}, over {TOLERANCE:g} of the largest. Do not use it"
        )
    console.print(f"verified: differences are within {TOLERANCE:g} of the largest logit")
