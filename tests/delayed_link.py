"""A network cable with a latency, for kernels without ``netem``: ``HOST_DEVICE SWITCH_DEVICE MICROSECONDS``.

Makes two TAP devices in its network namespace and passes frames between them: from the first to the second after the
given time, in the other direction at once. It says ``ready`` on standard output as soon as they are there, and ends
with its standard input. Frames are long (65,000 bytes), so that Python keeps up with some Gbit/s.
"""

from __future__ import annotations

import collections
import fcntl
import os
import select
import struct
import subprocess
import sys
import time

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
FRAME_BYTES = 65_000
_READ_BYTES = FRAME_BYTES + 100  # with the Ethernet header


def make_device(name: str) -> int:
    """Make the TAP device ``name``; return its file descriptor, which does not block."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    subprocess.run(["ip", "link", "set", name, "mtu", str(FRAME_BYTES)], check=True)
    return file


def relay(host: int, switch: int, delay_s: float) -> None:
    """Pass frames on until standard input ends."""
    late: collections.deque[tuple[float, bytes]] = collections.deque()
    while True:
        timeout = max(late[0][0] - time.monotonic(), 0.0) if late else None
        readable, _, _ = select.select([host, switch, 0], [], [], timeout)
        if 0 in readable and not os.read(0, 1):
            return
        if host in readable:
            late.append((time.monotonic() + delay_s, os.read(host, _READ_BYTES)))
        if switch in readable:
            _send(host, os.read(switch, _READ_BYTES))
        while late and late[0][0] <= time.monotonic():
            _send(switch, late.popleft()[1])


def _send(device: int, frame: bytes) -> None:
    try:
        os.write(device, frame)
    except OSError:  # the other side is down, or its queue is full: frames get lost on networks
        return


def main(argv: list[str]) -> None:
    host, switch = make_device(argv[0]), make_device(argv[1])
    print("ready", flush=True)
    relay(host, switch, float(argv[2]) / 1e6)


if __name__ == "__main__":
    main(sys.argv[1:])
