"""What a process does before it imports torch and megatron-core: how its threads wait, what is said while it starts,
and what the terminal gets of a text that it cannot show.

PyTorch's threads wait for each other at the end of every operation. In GNU's OpenMP early threads spin, by default for
so long that they rarely fall asleep. If other work needs the cores, the spinning threads take them from the thread that
they wait for: the quickstart on two cores fell from 5,500 to 33 tokens/s. A short spin costs 1.5% on a quiet machine
and keeps a training going on a busy one.

At import megatron-core warns about each missing optional library; `doctor` says it once, with the fix.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import locale
import logging
import os
import sys
import warnings

SPINS = "1000"

# Logged at every start, and nothing that who trains can act on: torch built for CUDA on a machine without, and what
# megatron-core from 0.17 on means to take away later.
_LOGGED = (
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
)


class _BeginsOtherwise(logging.Filter):
    """Lets through what does not begin with a text."""

    def __init__(self, beginning: str):
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


def wait_briefly() -> None:
    """Let threads spin `SPINS` turns and then sleep, unless the environment says how they shall wait: GOMP_SPINCOUNT or
    OMP_WAIT_POLICY, which are kept as they are.

    Call before torch is imported, because OpenMP reads its settings when it is loaded; child processes inherit them.
    Machines with GPUs get it as well: torch would have to be asked whether there is one, and there the threads of the
    host have little to wait for.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def silence_missing_libraries() -> None:
    """Filter megatron-core's warnings that Transformer Engine and apex are not installed, and of lines that it itself
    will have to change. Call before importing it."""
    for message in (".*Apex (is|are) not installed", ".*dynamic_context", "full scope is deprecated"):
        warnings.filterwarnings("ignore", message=message, module="megatron")
    warnings.filterwarnings("ignore", message=".* is experimental and still under active development")
    # How megatron-core from 0.19 on reads what is not a tensor in a checkpoint.
    for message in ("torch.distributed is disabled, unavailable", "The argument order of load has been changed"):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    for name, beginning in _LOGGED:
        logging.getLogger(name).addFilter(_BeginsOtherwise(beginning))
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="megatron")
    warnings.filterwarnings("ignore", message=".*deprecating ShardedTensor", category=FutureWarning)
    # The distributed optimizer: older names of collectives, and it looks at `grad` of views that have none.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*_tensor. is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf", module="megatron")


def accept_any_text() -> None:
    """Do with a locale of ASCII, which containers and jobs of batch systems often have. Libraries open their files in
    the locale's encoding (torch reads UTF-8 at import), and a character that the terminal lacks would be an error: it
    gets an escape such as `\\u2713`. Call before torch is imported."""
    if codecs.lookup(locale.getencoding()).name == "ascii":
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not what a test or a notebook puts there
            stream.reconfigure(errors="backslashreplace")


def configure_logging(level: str) -> None:
    """Let this package's own messages through from `level` on, plainly; other libraries from warnings on."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("moba_megatron").setLevel(level)
