"""Hosts on one machine: network namespaces joined by a virtual cable or switch, over which MPI uses TCP.

Needs root and iproute2. The machine's own network is not changed, and nothing is left when the context ends.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mpi import MPIRUN, ROOT

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_CABLE = "lapse0"
_READY_S = 20.0
_CABLE_US = 15.0  # the latency that a virtual cable has by itself on an idle machine
# MPICH's launcher calls this in the place of ssh: options, a host, and what to run there. Each has its own host name.
_AGENT = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
exec ip netns exec "%s-$host" unshare --uts --mount sh -c "%s; $*"
"""
_ADDRESS_AS_NAME = "hostname $host"
# As Debian does it, a host's own name has a loopback address; the other hosts' names have theirs.
_OWN_NAME = "mount --bind %s/$host /etc/hosts && hostname node-$host"
_SAME_NAME = "hostname alike"
# Without the name, a rank sometimes took the loopback, if it started right after its host was made.
ENVIRONMENT = {"FI_PROVIDER": "tcp", "FI_TCP_IFACE": _CABLE}


@dataclass(frozen=True)
class Hosts:
    """Return ``launcher`` for :func:`tests.mpi.start`.

    Attributes:
        launcher: A command for mpirun, by which the hosts are named by their addresses.
        named: The same, but the hosts have the names ``node-ADDRESS``, and take their own for the loopback's.
        alike: The same, but all hosts have the name ``alike``.
    """

    launcher: list[str]
    named: list[str]
    alike: list[str]
    namespaces: list[str]

    def sent_bytes(self) -> int:
        """Return the bytes sent over the cable, in both directions."""
        command = ["ip", "netns", "exec", self.namespaces[0], "cat", "/proc/net/dev"]
        (line,) = [line for line in _output(command).splitlines() if _CABLE in line]
        fields = line.partition(":")[2].split()
        return int(fields[0]) + int(fields[8])


def why_not() -> str:
    """Return why this machine cannot have such hosts; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "unshare", "hostname") if shutil.which(program) is None]
    if missing:
        return f"no {missing[0]} on this machine"
    trial = f"lapse-trial-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    _output(["ip", "netns", "del", trial])
    return ""


@dataclass(frozen=True)
class Link:
    """A host's link to the switch: bandwidth in each direction, and latency added to what the host sends."""

    gbit: float
    latency_us: float = 0.0


@functools.cache
def _has_netem() -> bool:
    with _namespaces([f"lapse-trial-{os.getpid()}"]) as (space,):
        command = ["ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def cannot_delay() -> str:
    """Return why links cannot have a latency here; empty if they can (by ``netem``, or by TAP devices)."""
    if _has_netem() or os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return ""
    return "the kernel has neither netem nor /dev/net/tun"


@contextlib.contextmanager
def two_hosts(ranks_a_host: int) -> Iterator[Hosts]:
    """Make two hosts that can reach each other and nobody else."""
    name = f"lapse-{os.getpid()}"
    with _namespaces([f"{name}-{address}" for address in ADDRESSES]) as spaces:
        peer = ["peer", "name", _CABLE, "netns", spaces[1]]
        _output(["ip", "link", "add", "name", _CABLE, "netns", spaces[0], "type", "veth", *peer])
        for space, address in zip(spaces, ADDRESSES, strict=True):
            _connect(space, address)
        _wait_until_ready(spaces)
        with _launchers(name, ADDRESSES, ranks_a_host) as commands:
            yield Hosts(*commands, spaces)


@contextlib.contextmanager
def switched_hosts(count: int, ranks_a_host: int, link: Link) -> Iterator[Hosts]:
    """Make ``count`` hosts at one switch, each by a link of its own, which can reach nobody else."""
    name = f"lapse-{os.getpid()}-switched"  # two_hosts may be there at the same time
    addresses = [f"10.77.0.{number + 1}" for number in range(count)]
    with contextlib.ExitStack() as stack:
        *spaces, switch = stack.enter_context(
            _namespaces([*(f"{name}-{address}" for address in addresses), f"{name}-switch"])
        )
        _output(["ip", "-n", switch, "link", "add", "switch", "type", "bridge"])
        _output(["ip", "-n", switch, "link", "set", "switch", "up"])
        for number, (space, address) in enumerate(zip(spaces, addresses, strict=True)):
            port = f"port{number}"
            in_software = link.latency_us > _CABLE_US and not _has_netem()
            if in_software:
                stack.enter_context(_delayed_cable(space, switch, port, link.latency_us))
            else:
                peer = ["peer", "name", port, "netns", switch]
                _output(["ip", "link", "add", "name", _CABLE, "netns", space, "type", "veth", *peer])
            _output(["ip", "-n", switch, "link", "set", port, "master", "switch", "up"])
            _connect(space, address)
            _shape(space, _CABLE, link if _has_netem() else Link(link.gbit))
            _shape(switch, port, Link(link.gbit))
        _wait_until_ready(spaces)
        commands = stack.enter_context(_launchers(name, addresses, ranks_a_host))
        yield Hosts(*commands, spaces)


@contextlib.contextmanager
def _delayed_cable(space: str, switch: str, port: str, latency_us: float) -> Iterator[None]:
    """Join a host and the switch by a process that delays what the host sends."""
    command = [sys.executable, "-m", "tests.delayed_link", _CABLE, port, f"{latency_us:g}"]
    process = subprocess.Popen(
        ["ip", "netns", "exec", space, *command], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    with process, process.stdin, process.stdout:
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("no TAP devices could be made")
        _output(["ip", "-n", space, "link", "set", port, "netns", switch])
        yield


def _shape(space: str, device: str, link: Link) -> None:
    """Limit what ``device`` sends, and delay it."""
    add = ["ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", device]
    where = ["root"]
    if link.latency_us:
        _output([*add, "root", "handle", "1:", "netem", "delay", f"{link.latency_us:g}us", "limit", "100000"])
        where = ["parent", "1:"]
    # A burst must hold what the link sends between two ticks of a kernel that counts 100 to 1,000 of them a second.
    burst = max(256_000, round(link.gbit * 1e9 / 8 / 1000))
    _output([*add, *where, "tbf", "rate", f"{link.gbit * 1000:g}mbit", "burst", str(burst), "latency", "100ms"])


def _connect(space: str, address: str) -> None:
    _output(["ip", "-n", space, "addr", "add", f"{address}/24", "dev", _CABLE])
    for device in ("lo", _CABLE):
        _output(["ip", "-n", space, "link", "set", device, "up"])


def _wait_until_ready(spaces: Sequence[str]) -> None:
    """Wait until the hosts' links are up and no address is tentative, about two seconds.

    MPI could not start before ("OFI call ep_enable failed"): it took an address that cannot be used yet.
    """
    end = time.monotonic() + _READY_S
    for space in spaces:
        show = ["ip", "-n", space, "addr", "show", "dev", _CABLE]
        # A TAP device is in the state UNKNOWN.
        while not re.search("state (UP|UNKNOWN)", seen := _output(show)) or "tentative" in seen:
            assert time.monotonic() < end, seen
            time.sleep(0.05)


@contextlib.contextmanager
def _launchers(
    name: str, addresses: Sequence[str], ranks_a_host: int
) -> Iterator[tuple[list[str], list[str], list[str]]]:
    """Yield the three commands of :class:`Hosts`, which start ranks in the namespaces ``name-ADDRESS``."""
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        for own in addresses:
            lines = [f"{'127.0.1.1' if address == own else address} node-{address}\n" for address in addresses]
            Path(folder, own).write_text("".join(lines))
        commands = []
        enter = ["ip", "netns", "exec", f"{name}-{addresses[0]}"]
        for number, naming in enumerate((_ADDRESS_AS_NAME, _OWN_NAME % folder, _SAME_NAME)):
            agent = Path(folder, f"agent{number}")
            agent.write_text(_AGENT % (name, naming))
            agent.chmod(0o755)
            where = ["-hosts", ",".join(addresses), "-ppn", str(ranks_a_host)]
            mpirun = [str(MPIRUN), "-launcher", "ssh", "-launcher-exec", str(agent), *where]
            # mpirun starts the ranks of its host itself.
            own_name = ["unshare", "--uts", "--mount", "sh", "-c", f'host={addresses[0]}; {naming}; exec "$0" "$@"']
            commands.append([*enter, *(own_name if number else []), *mpirun])
        by_address, named, alike = commands
        yield by_address, named, alike


@contextlib.contextmanager
def _namespaces(names: Sequence[str]) -> Iterator[list[str]]:
    try:
        for name in names:
            _output(["ip", "netns", "add", name])
        yield list(names)
    finally:
        for name in names:  # cables go with them
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
