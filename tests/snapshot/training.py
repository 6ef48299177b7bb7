"""Short trainings on the CPU: losses and gradient norms in full, and what evaluation, export and generation make."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from distributed import run_ranks
from safetensors.torch import load_file
from small_run import TOKENS, read_metrics, small_config, train_here

from snapshot.commands import elsewhere, run, run_training
from snapshot.texts import as_json, describe, sha256, without_places, write_lines

STAGES = [{"until": 0.5}, {"until": 1.0, "kind": "full"}]
LAYERS = {"1": {"block_size": 8, "top_k": 5}, "2": {"selector": "recent"}}
# Ranks, and changes of the small configuration.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "moba": (1, {}),
    "full": (1, {"attention__kind": "full"}),
    "stages": (1, {"attention__stages": STAGES, "checkpoint__every": 5, "evaluation__every": 5}),
    "bf16": (1, {"training__precision": "bf16", "model__share_embeddings_and_output_weights": True}),
    "stream": (1, {"data__cross_document_attention": True, "training__recompute": "full"}),
    "layers": (1, {"attention__layers": LAYERS, "attention__last_n_full": 0, "attention__full_layers": [3]}),
    "min_max": (1, {"attention__summary": "min_max"}),
    "threshold": (1, {"attention__selector": "threshold", "attention__threshold": 0.6}),
    "key_convolution": (1, {"attention__key_convolution": 3}),
    "index": (1, {"attention__router": "index", "attention__router_dim": 8}),
    "best_fit": (1, {"data__packing": "best_fit"}),
    "documents": (1, {"data__packing": "document", "data__min_document_length": 20}),
    "data_2": (2, {"parallel__distributed_optimizer": True}),
    "tensor_2": (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    "pipeline_2": (2, {"parallel__pipeline": 2}),
    "context_2": (2, {"parallel__context": 2}),
    "context_2_dispatch": (2, {"parallel__context": 2, "parallel__exchange": "dispatch"}),
    "context_2_convolution": (
        2,
        {"parallel__context": 2, "parallel__exchange": "p2p", "attention__key_convolution": 5},
    ),
}
EVALUATIONS = {
    "losses": ("--trailing", "16", "--samples", "4"),
    "choices": ("--losses-choice", "16:3", "--losses-choice", "8:4:recent", "--samples", "2"),
    "routing": ("--routing", "--routing-samples", "2"),
    "tasks": ("--tasks", "all", "--lengths", "96", "--task-samples", "2", "--depths", "0,0.5,1"),
}
# Runs that are evaluated, exported and generated from; what of `EVALUATIONS`.
LOOKED_AT = {"moba": tuple(EVALUATIONS), "stages": ("losses", "routing"), "bf16": ("losses",)}
STEP_NUMBERS = ("step", "tokens", "loss", "grad_norm", "lr", "stage")
PASSING = ("created", "seconds", "time", "tokens_per_second", "commit", "versions", "host")


def take_losses(out: Path) -> None:
    """Train each run in processes forked from this one, and the first once more by train.py."""
    torch.set_num_threads(1)
    with elsewhere() as folder:
        for name, (ranks, changes) in RUNS.items():
            config = small_config(_made(folder / name), training__steps=10, **changes)
            try:
                run_ranks(ranks, train_here, config, ranks, timeout=600)
            except AssertionError as error:
                write_lines(out, f"losses/{name}.txt", [without_places(str(error).splitlines()[-1], folder)])
                continue
            write_lines(out, f"losses/{name}.txt", _run_lines(Path(config.run.dir), folder))
            if name in LOOKED_AT:
                _look_at(out, name, Path(config.run.dir), folder)
        config = small_config(_made(folder / "script"), training__steps=10)
        Path("script.yaml").write_text(config.to_yaml())
        said = run_training("script.yaml", "training.steps=6")
        write_lines(out, "losses/script.txt", [said.splitlines()[-1], *_run_lines(Path(config.run.dir), folder)])


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _run_lines(run_folder: Path, root: Path) -> Iterator[str]:
    """Numbers of the steps and evaluations, the configuration as the run wrote it, and indices of the packing."""
    for line in read_metrics(run_folder):
        yield " ".join(f"{key}={line[key]!r}" for key in STEP_NUMBERS)
    for line in read_metrics(run_folder, "evaluations.jsonl"):
        yield as_json(without_passing(line, root))
    yield without_places((run_folder / "config.yaml").read_text(), root)
    # Their names and descriptions hold places.
    yield from sorted(f"index {sha256(path)}" for path in run_folder.parent.rglob("index_cache/*.npy"))


def _look_at(out: Path, name: str, run_folder: Path, root: Path) -> None:
    said = [f"{what}: {run('evaluate', run_folder, *EVALUATIONS[what])}" for what in LOOKED_AT[name]]
    write_lines(out, f"losses/{name}_evaluate_said.txt", said)
    for path in sorted((run_folder / "evaluation").rglob("*.json")):
        values = without_passing(json.loads(path.read_text()), root)
        write_lines(out, f"losses/{name}_evaluation/{path.name}", [as_json(values)])
    prompt = ("generate", run_folder, "--prompt", "w5 w7 w9 w3", "--tokens", "24")
    write_lines(out, f"losses/{name}_generated.txt", [run(*prompt, "--temperature", t) for t in ("0", "0.8")])
    ways = {"full": (), "moba": ("--self-contained",)} if name == "moba" else {"full": ()}
    for decode, more in ways.items():
        exported = root / f"{name}_{decode}"
        said = run("export-hf", run_folder, exported, "--decode", decode, *more)
        lines = [said, *sorted(path.name for path in exported.glob("*"))]
        for path in sorted(exported.glob("*.safetensors")):
            lines += [f"{key}: {describe(tensor)}" for key, tensor in sorted(load_file(path).items())]
        for path in ("config.json", "generation_config.json"):
            lines.append((exported / path).read_text() if (exported / path).exists() else f"no {path}")
        write_lines(out, f"losses/{name}_exported_{decode}.txt", [without_places("\n".join(lines), root)])


def without_passing(values: Any, root: Path) -> Any:
    """Results without times and places."""
    if isinstance(values, dict):
        return {key: without_passing(value, root) for key, value in values.items() if key not in PASSING}
    if isinstance(values, list):
        return [without_passing(value, root) for value in values]
    return without_places(values, root, TOKENS) if isinstance(values, str) else values
