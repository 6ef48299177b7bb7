"""Compute one step of a run again, to find its fault: `train.py CONFIG training.replay=STEP`.

The state comes from the newest checkpoint before the step, or from the first weights if there is no checkpoint. The
steps in between are computed again and leave nothing on disk. The report has the loss and the gradient norm of the
step. For each rank it names the layers whose outputs or parameter gradients are not finite, before the ranks add up
their gradients. The weights are not updated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moba_megatron.checkpoint.finite import is_finite
from moba_megatron.data.origins import documents_of
from moba_megatron.runs.files import readable_json_lines, write_whole
from moba_megatron.runs.folder import RunFolder
from moba_megatron.training.divergence import StepDiverged
from moba_megatron.training.finite import first_sample, gathered, number_for_json, readable_names
from moba_megatron.training.optimizer import UpdateRefused, update
from moba_megatron.training.trainer import Trainer

_MOST_DOCUMENTS = 64


def replay(trainer: Trainer, step: int) -> dict[str, Any]:
    """Take the steps before, and look at this one. Collective.

    Args:
        trainer: one that keeps nothing, at the position that it starts from.

    Returns:
        The report, as it is written to RUN/replay/step_N.json.
    """
    _take_those_before(trainer, step)
    with _looking(trainer.state.model) as seen:
        loss = trainer.compute(step)
    try:
        update(trainer.state.optimizer, lambda norm: True)
    except UpdateRefused as refused:
        norm = refused.grad_norm
    facts = gathered({**trainer.facts(step), **seen})
    config, ready = trainer.config, trainer.ready
    first = first_sample(ready.position, config, step)
    samples = range(first, first + config.training.global_batch_size)
    suspects = sorted({number for entry in facts for number in entry["loss"]}) or list(samples)
    report = {
        "step": step,
        "from": str(ready.resume) if ready.resume else None,
        "loss": number_for_json(loss),
        "grad_norm": number_for_json(norm),
        "samples": [samples[0], samples[-1]],
        "ranks": facts,
        "documents": [documents_of(trainer.train_data, number) for number in suspects[:_MOST_DOCUMENTS]],
        "suspects_in_all": len(suspects),
    }
    if torch.distributed.get_rank() == 0:
        path = RunFolder(config.run.dir).replay / f"step_{step}.json"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(report, indent=1) + "\n")
        for line in [*_lines(report), f"  {path}"]:
            trainer.progress.say(line)
    return report


def _take_those_before(trainer: Trainer, step: int) -> None:
    """Take the steps from the checkpoint on as the run took them."""
    lines, _ = readable_json_lines(RunFolder(trainer.config.run.dir).metrics)
    left_out = {line["step"] for line in lines if "skipped" in line}
    for number in range(trainer.ready.position.step + 1, step):
        why = trainer.skipped.why(number) or ("metrics.jsonl says so" if number in left_out else None)
        try:
            metrics = trainer.step(number) if why is None else trainer.pass_over(number, why)
        except StepDiverged as diverged:
            trainer.progress.say(f"step {number} before it: {diverged.why}; its update is left out")
            continue
        if why is None:
            trainer.progress.step(metrics, seconds_left=0.0)


@contextmanager
def _looking(model: list[torch.nn.Module]) -> Iterator[dict[str, Any]]:
    """Meanwhile, collect which outputs of layers and which gradients of parameters are not finite on this rank, first
    ones first: `outputs` and `own_gradients`."""
    seen: dict[str, list[str]] = {"outputs": [], "own_gradients": []}

    def note(kind: str, name: str, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and name not in seen[kind]:
            if not is_finite(tensor.detach()):
                seen[kind].append(name)

    hooks = []
    for name, module in _stations(model):
        hooks.append(module.register_forward_hook(_output_noted(name, note)))
    for name, parameter in readable_names(model):
        if parameter.requires_grad:
            hooks.append(parameter.register_hook(lambda grad, name=name: note("own_gradients", name, grad)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _stations(model: list[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module]]:
    """What a microbatch passes on this rank: embedding, layers, last norm."""
    for chunk in model:
        for name, module in chunk.named_modules():
            if re.fullmatch(r".*\.layers\.\d+", name) and hasattr(module, "layer_number"):
                yield f"layer {module.layer_number}", module
            elif name.endswith(("embedding", "final_layernorm")):
                yield name, module


def _output_noted(name: str, note: Callable[[str, str, Any], None]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        note("outputs", name, output[0] if isinstance(output, tuple) else output)

    return hook


def _lines(report: dict[str, Any]) -> list[str]:
    """The report in words."""
    origin = report["from"] or "the first weights"
    lines = [f"step {report['step']} again, from {origin}: loss {report['loss']}, gradient norm {report['grad_norm']}"]
    words = {
        "weights": "weights not finite",
        "outputs": "output not finite first in",
        "loss": "loss not finite in samples",
        "own_gradients": "gradient not finite first in",
    }
    for entry in report["ranks"]:
        lines += [
            f"  rank {entry['rank']}: {text} {', '.join(map(str, entry[kind][:4]))}"
            for kind, text in words.items()
            if entry[kind]
        ]
    return lines if len(lines) > 1 else [*lines, "  everything is finite"]
