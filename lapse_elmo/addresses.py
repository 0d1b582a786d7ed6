"""Under which address other ranks reach this one, for what does not go over MPI."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection

_LOOPBACK = "127.0.0.1"


def own_address(hosts: Collection[str]) -> str | None:
    """An IPv4 address of this host; None if none can be found.

    :param hosts: those of all ranks, this one's among them; where they are one, its loopback interface serves.
    """
    if len(set(hosts)) == 1:
        return _LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing: which interface leads out
        return str(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return None
