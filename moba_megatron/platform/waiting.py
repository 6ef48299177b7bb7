"""How the CPU threads of a process wait for each other.

PyTorch's threads meet at the end of every operation. GNU's OpenMP lets those that come early spin, and by default so
long that they mostly find the others before they fall asleep. Where other work wants the cores, the spinning takes
them from the very thread that is waited for: the quickstart on two cores fell from 5,500 to 33 tokens/s. A short spin
costs 1.5% on a quiet machine and keeps a training going on a busy one.
"""

from __future__ import annotations

import os

SPINS = "1000"


def wait_briefly() -> None:
    """Let threads spin `SPINS` turns and then sleep, unless the environment says how they shall wait: GOMP_SPINCOUNT or
    OMP_WAIT_POLICY, which are kept as they are.

    Call before torch is imported, because OpenMP reads its settings when it is loaded; child processes inherit them.
    Machines with GPUs get it as well: torch would have to be asked whether there is one, and there the threads of the
    host have little to wait for.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
