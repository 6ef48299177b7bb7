"""PyTorch's profiler for the steps that `logging.profile_steps` names."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from moba_megatron.config import Config
from moba_megatron.runs.folder import RunFolder


def step_profiler(
    config: Config, folder: RunFolder, device: torch.device, first_step: int
) -> AbstractContextManager[Any]:
    """The profiler for the chosen steps, one trace a rank in the run folder; else a stand-in that does nothing.

    Args:
        first_step: of this process; its `step()` is called after each.
    """
    chosen = config.logging.profile_steps
    if not chosen or chosen[1] < first_step:
        return nullcontext(_NoProfiler())
    first, last = max(chosen[0], first_step), chosen[1]
    before = first - first_step
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    folder.profile.mkdir(parents=True, exist_ok=True)
    trace = folder.profile / f"rank_{torch.distributed.get_rank()}_steps_{first}_{last}.json"
    return torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(
            skip_first=max(before - 1, 0), wait=0, warmup=min(before, 1), active=last - first + 1, repeat=1
        ),
        on_trace_ready=lambda profile: profile.export_chrome_trace(str(trace)),
    )


class _NoProfiler:
    def step(self) -> None:
        """Nothing is recorded."""
