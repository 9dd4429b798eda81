"""Two nodes on one machine: network namespaces joined by a cable of their own, or the loopback where these cannot be made."""

import contextlib
import os
import socket
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.faults import Job

ADDRESSES = ("192.0.2.2", "192.0.2.1")
"""Of the network that is reserved for documents; they exist in the namespaces alone. torchrun counts nodes by address: the second,
which does not keep the rendezvous, has rank 0 - and the first does, should it be alone."""
LOOPBACK = ("127.0.0.2", "127.0.0.1")
INTERFACE = "cable0"
RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=5,join_timeout=240,last_call_timeout=5,read_timeout=60"
VARIABLES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@dataclass(frozen=True)
class Node:
    """One of the two."""

    number: int
    address: str
    namespace: str
    """Empty on the loopback."""

    @property
    def is_apart(self) -> bool:
        """It has a network of its own, which can be cut off."""
        return bool(self.namespace)

    def unplug(self) -> None:
        """Take the cable out: nothing comes through, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "down")

    def plug_in(self) -> None:
        """Put it back."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "up")

    def start(self, tree: dict[str, Any], folder: Path, port: int, nodes: str = "2", restarts: int = 3, **variables: str) -> Job:
        """Start torchrun here with one rank; the rendezvous is on the first node."""
        endpoint = f"{(ADDRESSES if self.is_apart else LOOPBACK)[0]}:{port}"
        launcher = ["--nnodes", nodes, "--nproc-per-node", "1", "--max-restarts", str(restarts)]
        launcher += [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            endpoint,
            "--rdzv-conf",
            f"is_host={int(self.number == 0)},{RENDEZVOUS}",
        ]
        launcher += ["--local-addr", self.address]
        prefix = ("ip", "netns", "exec", self.namespace) if self.is_apart else ()
        interface = {"GLOO_SOCKET_IFNAME": INTERFACE} if self.is_apart else {}
        return Job(tree, folder, *launcher, prefix=prefix, variables={**VARIABLES, **interface, **variables})


@contextlib.contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two nodes that reach each other and nothing else; the namespaces are gone at the end."""
    names = [f"node{number}-{uuid.uuid4().hex[:8]}" for number in range(2)]
    try:
        if not _lay_cable(names):
            yield [Node(number, address, "") for number, address in enumerate(LOOPBACK)]
            return
        yield [Node(number, address, name) for number, (address, name) in enumerate(zip(ADDRESSES, names, strict=True))]
    finally:
        for name in names:
            _ip("netns", "del", name)


def _lay_cable(names: list[str]) -> bool:
    if os.geteuid() != 0:
        return False
    first, second = names
    steps = [("netns", "add", name) for name in names]
    steps += [("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)]
    for name, address in zip(names, ADDRESSES, strict=True):
        steps += [("-n", name, "addr", "add", f"{address}/30", "dev", INTERFACE)]
        steps += [("-n", name, "link", "set", device, "up") for device in ("lo", INTERFACE)]
    return all(_ip(*step) for step in steps)


def _ip(*arguments: str) -> bool:
    try:
        return subprocess.run(["ip", *arguments], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
