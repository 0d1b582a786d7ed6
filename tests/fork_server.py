"""Forks Python programs from a process that has imported torch: ``python -m tests.fork_server SOCKET``.

Importing torch takes two seconds of a core, and the tests start hundreds of ranks: without this they would spend more
time on imports than on anything else. A program that :mod:`tests.fork_client` asks for gets the arguments, environment,
working folder and open files of that client. It differs from a program started by itself in this: its parent is the
server, its command line in /proc is the server's, all programs have the same hash seed, and variables that Python or
torch read when they start have no effect. The server has not imported ``lapse_elmo`` or initialised MPI.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from tests.fork_client import NUMBER

CLIENT = Path(__file__).with_name("fork_client.py")
NAME = "LAPSE_ELMO_TEST_NAME"  # the variable with a name for the forked process, of at most 15 characters
_MOST_FILES = 253  # that a message over a socket can carry
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


@dataclass(frozen=True)
class _Request:
    """A program to run: Python's arguments, and what it inherits; the open files by the numbers that they will have."""

    arguments: list[str]
    folder: str
    environment: dict[str, str]
    cores: list[int]
    files: dict[int, int]


@cache
def address() -> str:
    """Return the socket of this process's fork server, which ends with this process."""
    path = os.path.join(tempfile.mkdtemp(prefix="lapse-elmo-fork-"), "socket")
    command = [sys.executable, "-m", __name__, path]
    root = Path(__file__).resolve().parent.parent
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_") and k != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, env=environment)
    assert server.stdout is not None
    assert server.stdout.read(1), "the fork server has not started"
    server.stdout.close()
    return path


def main(path: str) -> None:
    """Fork programs until the standard input ends; return only in a forked process, after its program."""
    import h5py  # noqa: F401
    import torch  # noqa: F401

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)
    os.write(1, b".")
    gc.freeze()  # so that no collection copies the pages shared with the forks
    request = _serve(listener)
    if request is None:
        os.unlink(path)
        os.rmdir(os.path.dirname(path))
    else:
        _run(request)


def _serve(listener: socket.socket) -> _Request | None:
    """Fork a process for each request; return the request in that process, or None at the end of the input."""
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    clients: dict[int, tuple[socket.socket, int]] = {}  # by the pidfd of the program: its client and its number
    programs: dict[socket.socket, int] = {}
    while True:
        for key, _ in selector.select():
            source = key.fileobj
            if source == 0:
                return None
            if source is listener:
                client, _ = listener.accept()
                request = _receive(client)
                if request is None:
                    client.close()
                    continue
                pid = os.fork()
                if not pid:
                    selector.close()
                    listener.close()
                    return request
                for file in request.files.values():
                    os.close(file)
                with contextlib.suppress(OSError):
                    client.sendall(NUMBER.pack(pid))
                end = os.pidfd_open(pid)
                clients[end], programs[client] = (client, pid), pid
                selector.register(client, selectors.EVENT_READ)
                selector.register(end, selectors.EVENT_READ)
            elif isinstance(source, socket.socket):
                if source in programs:  # its client has ended, so the program must
                    os.kill(programs[source], signal.SIGKILL)
                    selector.unregister(source)
            elif isinstance(source, int):
                client, pid = clients.pop(source)
                _, status = os.waitpid(pid, 0)
                selector.unregister(source)
                os.close(source)
                with contextlib.suppress(KeyError):
                    selector.unregister(client)
                with contextlib.suppress(OSError):
                    client.sendall(NUMBER.pack(status))
                del programs[client]
                client.close()


def _receive(client: socket.socket) -> _Request | None:
    """Read a request; None if the client has ended before it was complete."""
    numbers = array.array("i")
    header, ancillary, _, _ = client.recvmsg(NUMBER.size, socket.CMSG_SPACE(_MOST_FILES * numbers.itemsize))
    for _, _, data in ancillary:
        numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    body = b""
    if len(header) == NUMBER.size:
        (size,) = NUMBER.unpack(header)
        body = client.recv(size, socket.MSG_WAITALL)
        if len(body) == size:
            arguments, folder, environment, cores, files = json.loads(body)
            return _Request(arguments, folder, environment, cores, dict(zip(files, numbers, strict=True)))
    for number in numbers:
        os.close(number)
    return None


def _run(request: _Request) -> None:
    """Become the program of a request."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(request.environment)
    libc.prctl(_PR_SET_NAME, os.environ.pop(NAME, "forked").encode())
    os.chdir(request.folder)
    os.sched_setaffinity(0, request.cores)
    os.setsid()
    # First out of the way of the numbers that they will have, then to these.
    high = 1 + max([*request.files, *request.files.values(), 2])
    moved = {number: os.dup2(file, high + index) for index, (number, file) in enumerate(request.files.items())}
    os.closerange(0, high)
    for number, file in moved.items():
        os.dup2(file, number)
    os.closerange(high, high + len(moved))
    folders = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    first, *rest = request.arguments
    if first == "-m":
        sys.argv, sys.path[:1] = rest, [request.folder, *folders]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[:1] = ["-c", *rest[1:]], ["", *folders]
        sys.modules["__main__"] = program = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), program.__dict__)
    else:
        sys.argv, sys.path[:1] = request.arguments, [os.path.dirname(os.path.abspath(first)), *folders]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1])
