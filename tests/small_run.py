"""A training run small enough for a test: the committed synthetic tokens, a model of 50,000 parameters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from moba_megatron.config import Config, config_from_dict

TOKENS = Path(__file__).parent / "assets/tokens"


def copy_tokens(folder: Path) -> Path:
    """The synthetic tokens in a folder of the test's own, because megatron-core caches its indices beside them."""
    target = folder / "tokens"
    if not target.exists():
        shutil.copytree(TOKENS, target)
    return target


def small_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Configuration values, with `section__key=value` changes. Four layers, the last one full; MoBA with 3 of 8
    blocks."""
    tokens = copy_tokens(folder)
    values: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "threads": 1},
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 64,
        },
        "attention": {"block_size": 16, "top_k": 3, "last_n_full": 1},
        "data": {
            "train": str(tokens / "train"),
            "validation": str(tokens / "validation"),
            "tokenizer": str(tokens / "tokenizer"),
            "sequence_length": 128,
        },
        "training": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
        "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 2},
        "evaluation": {"samples": 8},
        "logging": {"tensorboard": False},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return values


def small_config(folder: Path, **changes: Any) -> Config:
    return config_from_dict(small_values(folder, **changes))


def begin_texts(tokenizer: Path, template: str = "w2 $A") -> None:
    """Give a tokenizer of these tokens a template, as Llama's has for the beginning of a text; its ids stay."""
    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    words = [word for word in template.split() if word != "$A"]
    special = [(word, backend.token_to_id(word)) for word in words]
    backend.post_processor = TemplateProcessing(single=template, special_tokens=special)
    backend.save(str(tokenizer / "tokenizer.json"))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"bos_token": words[0]}))


def train_here(config: Config, world_size: int = 1) -> tuple[str, int]:
    """Train inside a rank of `run_ranks`; returns how the run ended and after which step."""
    from moba_megatron.training.preflight import preflight
    from moba_megatron.training.run import train

    outcome = train(config, preflight(config, world_size))
    return outcome.state, outcome.step


def read_metrics(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def numbers_of(metrics: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must not change from run to run: everything but the times."""
    return [tuple(line[key] for key in ("step", "tokens", "loss", "grad_norm", "lr", "stage")) for line in metrics]
