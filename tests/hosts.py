"""Two hosts on one machine: network namespaces joined by a virtual cable, over which MPI uses TCP.

Needs root and iproute2. The machine's own network is not changed, and nothing is left when the context ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.mpi import MPIRUN

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_CABLE = "lapse0"
# MPICH's launcher calls this in the place of ssh: options, a host, and what to run there. Each has its own host name.
_AGENT = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
exec ip netns exec "%s-$host" unshare --uts sh -c "hostname $host; $*"
"""
ENVIRONMENT = {"FI_PROVIDER": "tcp"}


@dataclass(frozen=True)
class Hosts:
    """Return ``launcher`` for :func:`tests.mpi.start`."""

    launcher: list[str]
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


@contextlib.contextmanager
def two_hosts(ranks_a_host: int) -> Iterator[Hosts]:
    """Make two hosts that can reach each other and nobody else."""
    name = f"lapse-{os.getpid()}"
    spaces = [f"{name}-{address}" for address in ADDRESSES]
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        agent = Path(folder, "agent")
        agent.write_text(_AGENT % name)
        agent.chmod(0o755)
        try:
            for space in spaces:
                _output(["ip", "netns", "add", space])
            peer = ["peer", "name", _CABLE, "netns", spaces[1]]
            _output(["ip", "link", "add", "name", _CABLE, "netns", spaces[0], "type", "veth", *peer])
            for space, address in zip(spaces, ADDRESSES, strict=True):
                _output(["ip", "-n", space, "addr", "add", f"{address}/24", "dev", _CABLE])
                for device in ("lo", _CABLE):
                    _output(["ip", "-n", space, "link", "set", device, "up"])
            where = ["-hosts", ",".join(ADDRESSES), "-ppn", str(ranks_a_host)]
            options = ["-launcher", "ssh", "-launcher-exec", str(agent), *where]
            yield Hosts(["ip", "netns", "exec", spaces[0], str(MPIRUN), *options], spaces)
        finally:
            for space in spaces:  # the cable goes with them
                subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
