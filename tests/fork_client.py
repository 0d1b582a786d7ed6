"""Runs a Python program as a fork of a fork server: ``python -I -S fork_client.py SOCKET ARGUMENT ...``.

Takes the place of the program for the process that started it: forwards signals to it and ends with its status. See
:mod:`tests.fork_server`, which starts the program with the environment, the open files and the namespaces of this
process.
"""

import array
import contextlib
import json
import os
import signal
import socket
import struct
import sys

NUMBER = struct.Struct("q")  # of bytes of the request; from the server the process, and later the status of its wait

NAMESPACES = ("net", "uts", "mnt")


def is_open(file: int) -> bool:
    """Return whether the number is that of an open file."""
    try:
        os.fstat(file)
    except OSError:
        return False
    return True


def main(address: str, arguments: list[str]) -> int:
    """Run the program; return its status, or end by the signal that has ended it."""
    files = [int(name) for name in os.listdir("/proc/self/fd") if is_open(int(name))]
    namespaces = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in NAMESPACES]
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    cores = sorted(os.sched_getaffinity(0))
    request = json.dumps([arguments, os.getcwd(), dict(os.environ), cores, files]).encode()
    header = NUMBER.pack(len(request))
    # Signals wait until they can be forwarded: the program may be running, and be seen to be, before this process is.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    connection.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files + namespaces))])
    connection.sendall(request)
    (pid,) = NUMBER.unpack(connection.recv(NUMBER.size, socket.MSG_WAITALL))

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        with contextlib.suppress(OSError):  # those of the C library
            signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    answer = connection.recv(NUMBER.size, socket.MSG_WAITALL)
    if len(answer) < NUMBER.size:
        return 1  # the server has ended, and the program with it
    status = os.waitstatus_to_exitcode(*NUMBER.unpack(answer))
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
