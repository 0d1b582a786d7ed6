"""Forks Python programs from a process with the imports done: ``python -m tests.fork_server SOCKET``.

Importing torch takes two seconds of a core, TensorBoard's part of it and ``lapse_elmo.train`` another 0.7, and ending a
process with torch 0.2. The tests start hundreds of ranks: without this they would spend more time on starts and ends
than on anything else. A program that :mod:`tests.fork_client` asks for gets the arguments, environment, working folder,
open files and namespaces (its host's network, for instance) of that client. It differs from a program started by itself
in this: its parent is the server, its command line and environment in /proc are the server's, all programs have the
same hash seed, variables that Python or torch read when they start have no effect, ``torch`` and ``lapse_elmo`` are in
``sys.modules``, and at the end neither the modules nor the libraries that the server has loaded are torn down. The
server has not initialised MPI.
"""

from __future__ import annotations

import array
import atexit
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
import threading
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.fork_client import NAMESPACES, NUMBER

CLIENT = Path(__file__).with_name("fork_client.py")
NAME = "LAPSE_ELMO_TEST_NAME"  # the variable with a name for the forked process, of at most 11 characters
_RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")  # the variables of launchers with the rank, which follows the name
_MOST_FILES = 253  # that a message over a socket can carry, those of the namespaces included
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_PACKAGE = "lapse_elmo"
_UNWRITTEN = 120  # the status of a Python that cannot write its output at the end
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class _Request:
    """A program to run: Python's arguments, and what it inherits; the open files by the numbers that they will have.

    The namespaces are open files, too, in the order of ``NAMESPACES``.
    """

    arguments: list[str]
    folder: str
    environment: dict[str, str]
    cores: list[int]
    files: dict[int, int]
    namespaces: list[int]

    def close(self) -> None:
        """Close the files here."""
        for file in (*self.files.values(), *self.namespaces):
            os.close(file)


def command(*arguments: str) -> list[str]:
    """Return a command that runs Python with these arguments by this process's fork server."""
    return [sys.executable, "-I", "-S", str(CLIENT), address(), *arguments]


@cache
def address() -> str:
    """Return the socket of this process's fork server, which ends with this process."""
    path = os.path.join(tempfile.mkdtemp(prefix="lapse-elmo-fork-"), "socket")
    own = [sys.executable, "-m", __name__, path]
    root = Path(__file__).resolve().parent.parent
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_") and k != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    server = subprocess.Popen(own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, env=environment)
    assert server.stdout is not None
    assert server.stdout.read(1), "the fork server has not started"
    server.stdout.close()
    return path


def main(path: str) -> None:
    """Fork programs until the standard input ends; a forked process runs its program and does not return."""
    import h5py  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo
    import torch.distributed.tensor
    import torch.utils.tensorboard  # noqa: F401

    import lapse_elmo.embed
    import lapse_elmo.evaluate
    import lapse_elmo.score
    import lapse_elmo.train  # noqa: F401

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)
    os.write(1, b".")
    gc.collect()
    gc.freeze()  # so that no collection copies the pages shared with the forks
    request = _serve(listener)
    if request is not None:
        # The libraries loaded so far are not torn down: what is registered here is called before what they registered.
        _LIBC.on_exit(_LIBC._exit, None)
        _end(_status_of(request))
    os.unlink(path)
    os.rmdir(os.path.dirname(path))
    os._exit(0)  # some libraries print what they have leaked


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
                request.close()
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
            named, others = numbers[: len(files)], list(numbers[len(files) :])
            return _Request(arguments, folder, environment, cores, dict(zip(files, named, strict=True)), others)
    for number in numbers:
        os.close(number)
    return None


def _status_of(request: _Request) -> int:
    """Run the program of a request; return its exit status."""
    try:
        _run(request)
    except SystemExit as stop:
        if isinstance(stop.code, int) or stop.code is None:
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except Exception:  # (KeyboardInterrupt ends the interpreter by its signal)
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _end(status: int) -> None:
    """End the process as Python does, except that it keeps the objects of all modules."""
    private: Any = threading
    private._shutdown()  # waits for threads that are not daemons
    atexit._run_exitfuncs()
    mpi: Any = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = _UNWRITTEN
    _LIBC.fflush(None)
    _LIBC.exit(status)  # not _exit: only now MPICH tells the launcher that this rank has finished


def _run(request: _Request) -> None:
    """Become the program of a request."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(request.environment)
    rank = next((os.environ[name] for name in _RANK if name in os.environ), "0")
    _LIBC.prctl(_PR_SET_NAME, f"{os.environ.pop(NAME, 'forked')}{rank:0>4}".encode())
    _enter(request.namespaces)
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
        _forget_other_sources()
        sys.modules.pop(rest[0], None)  # for Python it would not be imported yet
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[:1] = ["-c", *rest[1:]], ["", *folders]
        _forget_other_sources()
        sys.modules["__main__"] = program = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), program.__dict__)
    else:
        sys.argv, sys.path[:1] = request.arguments, [os.path.dirname(os.path.abspath(first)), *folders]
        _forget_other_sources()
        runpy.run_path(first, run_name="__main__")


def _enter(namespaces: list[int]) -> None:
    """Enter those namespaces that are not the server's own, which only root may do, and close all."""
    for kind, file in zip(NAMESPACES, namespaces, strict=True):
        if os.fstat(file).st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino and _LIBC.setns(file, 0):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {kind} of the client")
        os.close(file)


def _forget_other_sources() -> None:
    """Drop the server's copy of the package if the program would import another one, or none."""
    found = PathFinder.find_spec(_PACKAGE)
    if found is None or found.origin != sys.modules[_PACKAGE].__file__:
        for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
            del sys.modules[name]


if __name__ == "__main__":
    main(sys.argv[1])
