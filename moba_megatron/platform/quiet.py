"""What is said while a process starts: our own messages, and less of megatron-core's.

At import, on a machine without its optional libraries, it warns once for each; `doctor` says it once, with the mend.
"""

from __future__ import annotations

import logging
import warnings


def silence_missing_libraries() -> None:
    """Filter megatron-core's warnings that Transformer Engine and apex are not installed, and of lines that it itself
    will have to change. Call before importing it."""
    for message in (".*Apex (is|are) not installed", ".*dynamic_context", "full scope is deprecated"):
        warnings.filterwarnings("ignore", message=message, module="megatron")
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="megatron")
    warnings.filterwarnings("ignore", message=".*deprecating ShardedTensor", category=FutureWarning)
    # The distributed optimizer: older names of collectives, and it looks at `grad` of views that have none.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*_tensor. is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf", module="megatron")


def configure_logging(level: str) -> None:
    """Let this package's own messages through from `level` on, plainly; other libraries from warnings on."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("moba_megatron").setLevel(level)
