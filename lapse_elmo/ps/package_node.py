"""A rank as a node of a native parameter server: start and end of the package and of its scheduler next to rank 0.

The packages read the scheduler's address from the environment and find each other through it. They wait for the other
nodes without a time limit, while holding the interpreter's lock. So everything that can be checked is checked before,
and a watchdog (:mod:`lapse_elmo.ps.scheduler`) limits the time of the rest.

The packages' messages go over TCP, neither authenticated nor encrypted. Ranks of one host use the loopback interface.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch

from lapse_elmo.errors import ConfigError, LaunchError, ServerError, in_one_line
from lapse_elmo.mpi.host import own_address
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.scheduler import ENDS, STARTS, UP

START_S = 120.0  # time limit of the start
_MARK = "_lapse_elmo_started"  # attribute of the package's module
_ATTEMPTS = 3  # to find a port, since another process may take a free one before it is used
_SCHEDULER = "import sys; from lapse_elmo.ps.scheduler import main; main(sys.argv[1:])"
# Reads what faulthandler writes when a process dies of a signal, and prints it as one line.
_CRASH_REPORTER = """
import os, sys
package, where = sys.argv[1:]
os.write(1, b"r")
line = b""
while not line.endswith(b"\\n") and (letter := os.read(0, 1)):
    line += letter
mark = "Fatal Python error: "
text = line.decode(errors="replace").strip()
if text.startswith(mark):
    cause = text.removeprefix(mark)
    os.write(2, (
        f"lapse-elmo: error: [{where}] the package {package} died at its start ({cause}): a fault of the package, "
        "often a race at start; restart the job, or omit --ps to use the embedded server\\n"
    ).encode())
while os.read(0, 4096):
    pass
"""
_FIRST_KEYS = 4  # keys per segment and node that are pulled to test the package
_SOURCE = Path(__file__).resolve().parent.parent.parent


class PackageNode(ABC):
    """This process as one node of a package, with one worker (construction and ``close`` are collective).

    A process can do this once: neither package can be set up again after it has been shut down. Nodes that do not come
    up in time end the job with a one-line message.

    Args:
        world: The ranks; each becomes a node.
        layout: The segments.
        technique: One of ``techniques``.
        start_s: Seconds within which the scheduler, and then all nodes, must be up.

    Attributes:
        server: The package's server object.
        worker: The package's worker object.

    Raises:
        ConfigError: If the package is not installed.
        ServerError: If this process has been a node of the package before.
        LaunchError: If the scheduler does not start or cannot be reached.
    """

    package: ClassVar[str]
    repository: ClassVar[str]
    techniques: ClassVar[Collection[str]]

    def __init__(self, world: World, layout: Layout, technique: str, start_s: float = START_S) -> None:
        self.world = world
        self.layout = layout
        self.technique = technique
        self.module = world.together(self._load)
        if hasattr(self.module, _MARK):
            raise ServerError(f"{self.package} was started in this process before; it can start only once")
        setattr(self.module, _MARK, True)
        self._hosts = world.allgather(world.host)
        self._scheduler: subprocess.Popen | None = None
        address, port = world.agree(lambda: self._start_scheduler(start_s))
        own = world.together(lambda: _own_address(address, port))
        os.environ.update(
            DMLC_ROLE="server", DMLC_NUM_SERVER=str(world.size), DMLC_PS_ROOT_URI=address, DMLC_PS_ROOT_PORT=str(port)
        )
        if "DMLC_INTERFACE" not in os.environ:
            os.environ.setdefault("DMLC_NODE_HOST", own)
        self._stdout = _Stdout()
        self._notify_watch(STARTS)
        crash_reporter = _CrashReporter(self.package, str(world))
        world.barrier()
        widths = np.concatenate([np.full(segment.num_rows, segment.row_width) for segment in layout.segments])
        self.server: Any
        self.worker: Any
        self.server, self.worker = self.start(torch.from_numpy(widths))
        world.barrier()
        # Some nodes come up but never answer, so the time limit includes a first operation on all of them.
        self._pull_from_every_node()
        world.barrier()
        self._notify_watch(UP)
        crash_reporter.close()
        # The package's threads must not outlive the interpreter, also if all ranks end by an error.
        atexit.register(self.close)
        self.closed = False

    def _pull_from_every_node(self) -> None:
        """Pull rows spread over each segment, which come from every node."""
        for segment in self.layout.segments:
            number = min(segment.num_rows, _FIRST_KEYS * self.world.size)
            rows = np.unique(np.linspace(0, segment.num_rows - 1, number).astype(np.int64))
            self.worker.pull(segment.keys(rows), np.empty((rows.size, segment.row_width), np.float32), False)

    @abstractmethod
    def load(self) -> ModuleType:
        """Import the package."""

    @abstractmethod
    def start(self, widths: torch.Tensor) -> tuple[Any, Any]:
        """Start the node; return the package's server and worker objects.

        Args:
            widths: Floats per row of each key, (num_keys,) int64.
        """

    @abstractmethod
    def stop(self) -> None:
        """Shut the package down (collective)."""

    def close(self) -> None:
        """End the worker, the node and the scheduler, in this order (collective)."""
        if self.closed:
            return
        self.closed = True
        atexit.unregister(self.close)
        self.world.barrier()
        self._notify_watch(ENDS)
        self.stop()
        self._stdout.restore()
        if self._scheduler is not None:
            assert self._scheduler.stdin is not None
            self._scheduler.stdin.close()
            self._scheduler.wait()

    def _load(self) -> ModuleType:
        """Import the package, or raise ConfigError that says why that is not possible."""
        try:
            module = self.load()
        except ModuleNotFoundError:
            why = "is not installed"
        except ImportError as error:
            why = f"cannot be loaded ({in_one_line(error)})"
        else:
            if hasattr(module, "Worker"):
                return module
            why = f"is another package of that name ({module.__file__})"
        raise ConfigError(
            f"--ps {self.package}: the Python package {self.package} {why}; {self.repository} says how to build its "
            "bindings, for this Python and torch; or omit --ps to use the embedded server"
        )

    def _start_scheduler(self, start_s: float) -> tuple[str, int]:
        """Start the scheduler on rank 0 and wait until it listens; return its address and port."""
        address = os.environ.get("DMLC_PS_ROOT_URI") or self._address()
        for _ in range(_ATTEMPTS):
            port = _free_port(address)
            environment = {
                **os.environ, "DMLC_ROLE": "scheduler", "DMLC_NUM_SERVER": str(self.world.size),
                "DMLC_PS_ROOT_URI": address, "DMLC_PS_ROOT_PORT": str(port),
                "PYTHONPATH": os.pathsep.join(filter(None, [str(_SOURCE), os.environ.get("PYTHONPATH")])),
            }
            words = [type(self).__module__, str(self.layout.num_keys), str(start_s), str(os.getpid())]
            self._scheduler = subprocess.Popen(
                [sys.executable, "-c", _SCHEDULER, *words], stdin=subprocess.PIPE, env=environment
            )
            deadline = time.monotonic() + start_s
            while self._scheduler.poll() is None:
                if _listens(address, port):
                    return address, port
                if time.monotonic() > deadline:
                    self._scheduler.kill()
                    raise LaunchError(f"the scheduler of {self.package} was not up after {start_s:.0f} s")
                time.sleep(0.05)
        raise LaunchError(
            f"the scheduler of {self.package} cannot start at {address}: if that is not an address of this host, set "
            "DMLC_PS_ROOT_URI to one; otherwise see the scheduler's error above"
        )

    def _address(self) -> str:
        """Return an address of this host by which the other ranks can reach it."""
        address = own_address(self._hosts)
        if address is None:
            raise LaunchError("no address of this host is known for the scheduler: set DMLC_PS_ROOT_URI to one")
        return address

    def _notify_watch(self, letter: bytes) -> None:
        """Send the watchdog a letter; does nothing on ranks other than 0."""
        if self._scheduler is not None:
            assert self._scheduler.stdin is not None
            self._scheduler.stdin.write(letter)
            self._scheduler.stdin.flush()


class _CrashReporter:
    """A process that reports in one line if this one dies of a signal, until :meth:`close`.

    When C++ code crashes, Python cannot report anything any more. SIGKILL, which launchers send to the ranks of a job
    that has failed elsewhere, is not reported.
    """

    def __init__(self, package: str, where: str) -> None:
        # With the smallest buffer, faulthandler's many small writes block until they are read. That delays the death of
        # this process until the line is printed; afterwards the launcher may end everything at once.
        self._socket, other = socket.socketpair()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _CRASH_REPORTER, package, where], stdin=other.fileno(),
                stdout=subprocess.PIPE, start_new_session=True,
            )
        assert self._process.stdout is not None
        self._process.stdout.read(1)  # returns when the process is ready
        self._before = faulthandler.is_enabled()
        faulthandler.enable(self._socket.fileno(), all_threads=False)

    def close(self) -> None:
        """End the process and restore faulthandler."""
        faulthandler.disable()
        if self._before:
            faulthandler.enable()
        self._socket.close()
        self._process.communicate()


class _Stdout:
    """Reserves standard output for Python while the package, which prints its progress there, is in use.

    The output of the package's C++ code is dropped unless its own variable PS_VERBOSE is set.
    """

    def __init__(self) -> None:
        self._python = sys.stdout
        sys.stdout.flush()
        self._file: int | None = None
        if os.environ.get("PS_VERBOSE", "0") == "0":
            self._file = os.dup(1)
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.close(devnull)
            sys.stdout = os.fdopen(self._file, "w", encoding=self._python.encoding, closefd=False)

    def restore(self) -> None:
        """Give standard output back to C++ code."""
        if self._file is not None:
            sys.stdout.flush()
            os.dup2(self._file, 1)
            os.close(self._file)
            sys.stdout = self._python


def _free_port(address: str) -> int:
    try:
        with socket.create_server((address, 0)) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        raise LaunchError(
            f"the scheduler cannot listen at {address} ({error.strerror}): set DMLC_PS_ROOT_URI to an address of this "
            "host"
        ) from None


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 2).close()
    except OSError:
        return False
    return True


def _own_address(address: str, port: int) -> str:
    """Return the address of this host's interface that reaches the scheduler."""
    try:
        with socket.create_connection((address, port), 10) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise LaunchError(
            f"the scheduler at {address}:{port} cannot be reached from {socket.gethostname()} "
            f"({error.strerror or error}): set DMLC_PS_ROOT_URI to an address of rank 0's host"
        ) from None
