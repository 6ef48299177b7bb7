"""Features of the installed megatron-core that other releases do not have. The code tests for the feature, never for
the version.

Everything here works with megatron-core 0.16 to 0.19. If a name or a default changed, the code that uses it checks for
it: the checkpoint writer's queue and the streams of a CPU in `differences`, the parameters of the spec functions in
`model.specs`, the writer's name here.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Capability:
    """Something that not every supported release has: `without`, what cannot be done where it is missing."""

    name: str
    without: str
    present: Callable[[], bool]


def _has_hybrid_model() -> bool:
    return importlib.util.find_spec("megatron.core.models.hybrid") is not None


def _has_inter_document_masking() -> bool:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return "inter_document_masking" in {field.name for field in dataclasses.fields(GPTDatasetConfig)}


CAPABILITIES = (
    Capability(
        "HybridModel",
        "moba_megatron.megatron.hybrid_stack_spec, for layers of attention among others (from 0.18 on)",
        _has_hybrid_model,
    ),
    Capability(
        "document boundaries in its own GPTDataset",
        "--dataloader-inter-document-masking of Megatron-LM's pretrain_gpt.py (from 0.19 on); train.py has its own",
        _has_inter_document_masking,
    ),
)


def missing_capabilities() -> list[Capability]:
    """Features of later supported releases that the installed megatron-core lacks."""
    return [capability for capability in CAPABILITIES if not capability.present()]


def imported_elsewhere() -> str | None:
    """Version and folder of the megatron-core that Python imports; None where it is the installed one. A checkout of
    Megatron-LM on PYTHONPATH carries its own."""
    import megatron.core

    folder = Path(megatron.core.__file__).parents[2]
    try:
        installed = Path(importlib.metadata.distribution("megatron-core").locate_file("")).resolve()
    except importlib.metadata.PackageNotFoundError:
        installed = None
    return None if folder.resolve() == installed else f"{megatron.core.__version__} from {folder}"


def save_arguments() -> dict[str, Any]:
    """The arguments for `dist_checkpointing.save`. From 0.17 on its writer has to be named: the default is that of
    another package (nvidia-resiliency-ext), which need not be there."""
    from megatron.core import dist_checkpointing

    named = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if named else {}


def reads_common_state_among_tensors() -> bool:
    """Whether `dist_checkpointing.load` finds what is not a tensor without a file `common.pt` (from 0.19 on)."""
    from megatron.core.dist_checkpointing import serialization

    return hasattr(serialization, "_legacy_common_state_exists")
