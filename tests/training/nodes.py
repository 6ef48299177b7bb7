"""Two nodes on one machine: two network namespaces joined by a veth pair, or two loopback addresses.

A namespace lives as long as a process is in it. Each one is held by a `cat` that reads from a pipe of the test: it ends
with the test, however that ends, and namespace and veth end with it. No name and no interface ever appears outside.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from processes import ROOT, start_command

# As root of a user namespace of its own, so that it works for every user where the machine allows it.
UNSHARE = ("unshare", "--user", "--map-root-user", "--net")
ENTER = ("nsenter", "--preserve-credentials", "--user", "--net", "--target")


@dataclass(frozen=True)
class Node:
    """`enter`: what precedes a command to run it on this node."""

    address: str
    enter: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def available_kind() -> str:
    """`namespaces` where this machine allows them, else `loopback`."""
    tools = all(shutil.which(name) for name in ("unshare", "nsenter", "ip"))
    allowed = tools and subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
    return "namespaces" if allowed else "loopback"


@contextlib.contextmanager
def two_nodes(kind: str) -> Iterator[list[Node]]:
    """Two nodes, the first of them the head."""
    if kind == "loopback":
        addresses = ("127.0.0.1", "127.0.0.2")
        yield [Node(address, (), {"INTERFACE": "lo", "ADDRESS": address}) for address in addresses]
        return
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(_namespace(UNSHARE))
        # The second is a network namespace under the same user namespace, or the first could not reach into it.
        inside_user = ("nsenter", "--preserve-credentials", "--user", "--target", str(first))
        second = stack.enter_context(_namespace((*inside_user, "unshare", "--net")))
        nodes = [Node("10.0.0.1", (*ENTER, str(first))), Node("10.0.0.2", (*ENTER, str(second)))]
        _on(nodes[0], f"ip link add eth0 type veth peer name eth0 netns {second}")
        for node in nodes:
            for change in ("link set lo up", f"addr add {node.address}/24 dev eth0", "link set eth0 up"):
                _on(node, f"ip {change}")
        yield nodes


@contextlib.contextmanager
def started_on(
    nodes: list[Node], config: Path, overrides: Sequence[tuple[str, ...]] = ((), ())
) -> Iterator[list[subprocess.Popen[str]]]:
    """The launchers of a training with one rank a node, each with overrides of its own; they do not outlive the
    block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch, path = str(ROOT / "launch/multi_node.sh"), f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    agents = []
    try:
        for number, node in enumerate(nodes):
            arguments = [str(len(nodes)), str(number), nodes[0].address, "1", str(config), *overrides[number]]
            agents.append(start_command([*node.enter, launch, *arguments], PORT=port, PATH=path, **node.environment))
        yield agents
    finally:
        for agent in agents:
            agent.kill()


@contextlib.contextmanager
def _namespace(unshare: tuple[str, ...]) -> Iterator[int]:
    """The process that holds a new network namespace."""
    holder = subprocess.Popen(
        [*unshare, "sh", "-c", "echo $$; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield int(holder.stdout.readline())
    finally:
        holder.communicate()


def _on(node: Node, command: str) -> None:
    subprocess.run([*node.enter, *command.split()], check=True)
