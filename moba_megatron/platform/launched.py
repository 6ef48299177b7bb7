"""The environment variables of a launcher, checked before any process waits for another: torchrun's variables, and
those of the same names that batch systems and pods set."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass

from moba_megatron.config import ConfigError

SECONDS_FOR_A_NAME = 5.0
"""For so long a host may be unknown: the name of a pod takes a moment to be there."""


@dataclass(frozen=True)
class Launch:
    """How many processes were started, and which of them this one is."""

    world_size: int
    rank: int
    local_rank: int
    local_ranks: int
    """Processes on this machine."""


def check_launch(*, alone: bool = False, seconds: float = SECONDS_FOR_A_NAME) -> Launch:
    """Read WORLD_SIZE, RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        alone: this process speaks to no others: WORLD_SIZE may be said without the rest, and no host is looked for.
        seconds: how long the host of MASTER_ADDR may be unknown.

    Raises:
        ConfigError: for each variable that is no such number or does not fit the others, that is missing
            beside RANK, and for a host that is not known here.
    """
    problems: list[str] = []

    def number(name: str, least: int, default: int) -> int:
        text = os.environ.get(name)
        if text is None:
            return default
        if not text.strip().isdecimal() or not text.isascii() or int(text) < least:
            problems.append(f"{name} = {text!r} is not a number of {least} or more: {_FIX}")
            return default
        return int(text)

    world_size, rank = number("WORLD_SIZE", 1, 1), number("RANK", 0, 0)
    local_size, local_rank = number("LOCAL_WORLD_SIZE", 1, 1), number("LOCAL_RANK", 0, 0)
    port = number("MASTER_PORT", 0, 0)
    if not problems:
        problems += [
            f"{name} = {value} is not below {of} = {size}: {_FIX}"
            for name, value, of, size in (
                ("RANK", rank, "WORLD_SIZE", world_size),
                ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_size),
            )
            if of in os.environ and value >= size
        ]
        if port > 65535:
            problems.append(f"MASTER_PORT = {port} is not a port: it is at most 65535; {_FIX}")
        if not alone:
            problems += _incomplete(world_size)
    if not problems and not alone and "RANK" in os.environ and not _known(host := os.environ["MASTER_ADDR"], seconds):
        problems.append(f"MASTER_ADDR = {host!r} does not resolve on this machine: give rank 0's name or address")
    if problems:
        raise ConfigError("; ".join(problems))
    return Launch(world_size, rank, local_rank, local_size)


_FIX = "start with torchrun, which sets it, or take it out of the environment"


def _incomplete(world_size: int) -> list[str]:
    """Variables that are missing beside those that are there."""
    if "RANK" not in os.environ:
        if world_size == 1:
            return []
        return [f"WORLD_SIZE = {world_size} without RANK: this process would wait for others; {_FIX}"]
    needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return [
        f"RANK = {os.environ['RANK']} without {name}: start with torchrun, which sets it, or take RANK out of the "
        "environment"
        for name in needed
        if not os.environ.get(name)
    ]


def _known(host: str, seconds: float) -> bool:
    """Whether a host's name leads to an address, within some seconds. Name servers may take a minute to say no."""
    found = threading.Event()

    def look() -> None:
        deadline = time.monotonic() + seconds
        while not found.is_set() and time.monotonic() < deadline:
            try:
                socket.getaddrinfo(host, None)
                found.set()
            except (OSError, UnicodeError):
                time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))

    threading.Thread(target=look, name="find_host", daemon=True).start()
    return found.wait(seconds)
