"""The differences between a CPU and a CUDA machine, and the start and stop of the process groups.

`apply` is called once, explicitly, at the start of a process and before any megatron-core object is built; importing
this package changes nothing.
"""

from moba_megatron.platform.device import current_device
from moba_megatron.platform.differences import DIFFERENCES, Difference, applied, apply, restore
from moba_megatron.platform.libraries import Library, optional_libraries
from moba_megatron.platform.process_groups import (
    seed_all,
    start_model_parallel,
    start_process_group,
    stop_process_groups,
)

__all__ = [
    "DIFFERENCES",
    "Difference",
    "Library",
    "applied",
    "apply",
    "current_device",
    "optional_libraries",
    "restore",
    "seed_all",
    "start_model_parallel",
    "start_process_group",
    "stop_process_groups",
]
