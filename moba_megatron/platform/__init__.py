"""What differs between a CPU and a CUDA machine, and the start and stop of the process groups.

`apply` is called once, explicitly, at the start of a process and before any megatron-core object is built; importing
this package changes nothing, and imports torch only when one of its names is asked for: `waiting` comes before torch.
"""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "DIFFERENCES": "differences",
    "Difference": "differences",
    "Library": "libraries",
    "applied": "differences",
    "apply": "differences",
    "current_device": "device",
    "optional_libraries": "libraries",
    "restore": "differences",
    "seed_all": "process_groups",
    "start_model_parallel": "process_groups",
    "start_process_group": "process_groups",
    "stop_process_groups": "process_groups",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
