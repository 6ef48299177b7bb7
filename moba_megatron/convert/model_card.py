"""The README of an exported model: how to run it, its training, its behaviour in other engines, its evaluations, and
its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from moba_megatron.config import ModelConfig
from moba_megatron.convert.exported import Exported
from moba_megatron.convert.mapping import parameter_counts
from moba_megatron.convert.origin import origin_of
from moba_megatron.hf.settings import MoBASettings
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.runs.files import read_json_lines
from moba_megatron.runs.folder import RunFolder, training_records

_SPARSE = """\
{layers} of {all_layers} layers attend by Mixture of Block Attention (MoBA, arXiv 2502.13189): each query to its own
block and to the {past} past blocks of {block_size} tokens {chosen}{others}"""
_MOBA = (
    f"## Attention\n\n{_SPARSE}"
    + """. `moba_config` in
`config.json` says so.

**Engines that do not know `moba_config` run this model with full attention.** vLLM and SGLang do so, and so does
transformers if you name another attention. Up to {covered:,} tokens of context the results are the same; beyond, they
differ from the training. transformers 5 refuses to load the model if no package has registered the attention;
transformers 4 silently uses full attention unless you name the attention:

```python
{load}
```
"""
)
_CONVOLVED = """## Attention

{sparse}Keys are convolved over {width} tokens before attention (FlashMoBA, arXiv 2511.11571), in all layers, by filters
that only the code of this folder reads. `moba_config` in `config.json` names them.

**Without that code an engine runs another model**, with plain keys and full attention, at any length.

```python
{load}
```
"""
_WITH_PACKAGE = """import moba_megatron.hf  # registers the attention
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", attn_implementation="moba")"""
_WITH_OWN_CODE = """from transformers import AutoModelForCausalLM

# Runs modeling_moba.py of this folder. Faster, with the package moba-megatron: import moba_megatron.hf
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)"""
_TOKENIZER = """## Tokenizer

```python
from transformers import {reader}

tokenizer = {reader}.from_pretrained("{name}")
```
{warning}"""
_NOT_AUTO = """
`AutoTokenizer` builds another tokenizer for this `model_type`, with other ids. Use the class above.
"""
_FULL = """## Attention

All layers attend fully. This is a plain {architecture}: any engine runs it as it was trained.
"""

_FITS = {"mean": "mean key fits", "min_max": "channel-wise bounds of keys fit"}
_CHOSEN = {
    "top_k": "whose {summary} it best",
    "recent": "nearest to it (a sliding window)",
    "sink_recent": "that are the first one and the nearest to it (a sliding window with an attention sink)",
    "threshold": "whose {summary} it best, or fewer: until their share of the scores' softmax reaches {threshold}",
}
_SHARED = {
    "none": "",
    "mean": " (the query heads of a key head choose together, by the mean of their scores)",
    "max": " (the query heads of a key head choose together, by the largest of their scores)",
}
_INDEXED = (
    ", by an index with weights of its own (`self_attn.block_router`; engines that do not know these may refuse the "
    "folder)"
)
_OF_TASKS = ("_greedy_match", "_ranked_first", "_answer_nats")


def model_card(name: str, exported: Exported, values: dict[str, Any], reader: str | None) -> str:
    """The text of README.md.

    Args:
        name: of the exported folder.
        exported: what was exported.
        values: the contents of its config.json.
        reader: the class of transformers that reads its tokenizer, if it has one.
    """
    moba = values.get("moba_config")
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
    head += "tags:\n- moba\n" if moba else ""
    if known := origin_of(exported.checkpoint) or _origin_of_source(exported):
        head += yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
    head += "---\n\n"
    parts = [f"# {name}\n", _attention(name, values)]
    if reader:
        warning = "" if reader == "AutoTokenizer" else _NOT_AUTO
        parts.append(_TOKENIZER.format(name=name, reader=reader, warning=warning))
    parts.append(_training(exported))
    if results := evaluation_table(
        read_json_lines(RunFolder.of(exported.checkpoint).evaluations), exported.manifest.step
    ):
        parts.append(results)
    return head + "\n".join(parts)


def _origin_of_source(exported: Exported) -> dict[str, Any]:
    """For a run that is older than its note: what the source says, if it is still there."""
    source = exported.config.model.init_from
    return origin_of(source) if source else {}


def _attention(name: str, values: dict[str, Any]) -> str:
    moba = values.get("moba_config")
    if moba is None:
        return _FULL.format(architecture=values["architectures"][0])
    settings = MoBASettings.from_entry(moba, values["num_hidden_layers"])
    others = []
    for number in sorted({*settings.layer_sizes, *settings.layer_selections}):
        own = settings.of_layer(number)
        words = f" {_CHOSEN[own.selection.selector]}" if number in settings.layer_selections else ""
        others.append(f"layer {number + 1}: {_past(own)} of {own.block_size}{words.format(**_said(own))}")
    load = (_WITH_OWN_CODE if "auto_map" in values else _WITH_PACKAGE).format(name=name)
    facts = dict(
        load=load,
        layers=settings.layer_types.count("moba"),
        all_layers=len(settings.layer_types),
        past=_past(settings),
        block_size=settings.block_size,
        chosen=_CHOSEN[settings.selection.selector].format(**_said(settings))
        + _SHARED[settings.selection.share_selection]
        + (_INDEXED if settings.index else ""),
        others=f" ({'; '.join(others)})" if others else "",
        covered=settings.covered,
    )
    if settings.key_convolution is None:
        return _MOBA.format(**facts)
    sparse = _SPARSE.format(**facts) + ".\n\n" if settings.covered else ""
    return _CONVOLVED.format(sparse=sparse, width=settings.key_convolution, load=load)


def _past(settings: MoBASettings) -> str:
    """How many past blocks a query attends."""
    numbers = ", ".join(str(k - 1) for k in settings.selection.budgets or (settings.top_k,))
    return f"{numbers} (by key head)" if settings.selection.budgets else numbers


def _said(settings: MoBASettings) -> dict[str, Any]:
    """The values for the placeholders of a selector's text."""
    return {
        "summary": _FITS[settings.selection.summary],
        "threshold": settings.selection.threshold,
    }


def _training(exported: Exported) -> str:
    manifest, config = exported.manifest, exported.config
    schedule = AttentionSchedule.from_dict(manifest.schedule)
    facts = {
        **_experts(exported.model),
        "optimizer steps": f"{manifest.step:,} of {config.training.steps:,}",
        "tokens": f"{manifest.tokens:,}",
        "tokens per sequence": f"{config.data.sequence_length:,}",
        "sequences per step": f"{config.training.global_batch_size:,}",
        "precision": config.training.precision,
        "peak learning rate": f"{config.optimizer.lr:g}",
        "weights to begin with": Path(config.model.init_from).name if config.model.init_from else "random",
        "attention while training": "<br>".join(schedule.table().splitlines()),
        **_losses(exported),
        "software": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    lines = ["## Training", "", "| | |", "|---|---|", *[f"| {key} | {value} |" for key, value in facts.items()]]
    return "\n".join(lines) + "\n"


def _experts(model: ModelConfig) -> dict[str, str]:
    """The size of a mixture of experts, which its shapes do not show at a glance; nothing of a dense model."""
    if model.num_moe_experts is None:
        return {}
    total, active = parameter_counts(model)
    shared = ", and one for all tokens" if model.moe_shared_expert_intermediate_size else ""
    layers = sum(model.expert_layers)
    return {
        "parameters": f"{total:,}, {active:,} active for a token",
        "experts": f"{model.moe_router_topk} of {model.num_moe_experts} for each token{shared}, in {layers} of "
        f"{model.num_layers} layers",
    }


def evaluation_table(lines: list[dict[str, Any]], step: int) -> str:
    """The results of `moba-megatron evaluate` for the model of a step, as a section of the card; empty if nothing.

    Args:
        lines: of `evaluations.jsonl`. The last one counts where several say the same; those of attentions that are not
            the model's own sizes (`choice`) do not.
    """
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        if line.get("step") == step and "choice" not in line:
            for name, value in _numbers(line).items():
                found.setdefault(name, {})[line["attention"]] = f"{value:.4g}"
    if not found:
        return ""
    attentions = sorted({attention for values in found.values() for attention in values}, reverse=True)
    head = ["## Evaluation", "", f"| | {' | '.join(f'{name} attention' for name in attentions)} |"]
    head.append(f"|{'---|' * (len(attentions) + 1)}")
    rows = [f"| {name} | {' | '.join(values.get(a, '') for a in attentions)} |" for name, values in found.items()]
    return "\n".join([*head, *rows]) + "\n"


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    """The results of a line of `evaluations.jsonl`, with names for a reader of the card."""
    kind = line.get("kind")
    if kind == "losses":
        data = f"on {Path(str(line.get('data'))).name}, {line.get('samples')} samples (nats per token)"
        named = {
            f"{word} loss {data}": line.get(key) for word, key in (("mean", "loss"), ("trailing", "trailing_loss"))
        }
    elif kind == "tasks":
        where = f"{line.get('haystack')}, {line.get('samples')} samples"
        named = {f"`{key}` ({where})": value for key, value in line.items() if key.endswith(_OF_TASKS)}
    elif kind == "lm_eval":
        limit = f", first {line['limit']} samples" if line.get("limit") else ""
        named = {f"{key} (lm-eval{limit})": value for key, value in line.items() if "/" in key}
    else:
        named = {}
    return {name: value for name, value in named.items() if isinstance(value, int | float)}


def _losses(exported: Exported) -> dict[str, str]:
    """The evaluation of this step in the run folder."""
    lines = training_records(read_json_lines(RunFolder.of(exported.checkpoint).evaluations))
    for values in reversed(lines):
        if values["step"] == exported.manifest.step:
            return {"validation loss (nats per token)": f"{values['loss']:.4f}"}
    return {}
