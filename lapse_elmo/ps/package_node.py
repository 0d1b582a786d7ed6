"""A rank as a node of a native parameter server: the scheduler beside rank 0, the start and the end of the package.

The packages read where the scheduler is from the environment, find each other through it, and block while they wait:
for the other nodes without a limit, and with Python's lock held. So everything that can be checked before is checked
before, and a watch (:mod:`lapse_elmo.ps.scheduler`) bounds the rest.

Their messages go over TCP, neither authenticated nor encrypted. Ranks of one host use the loopback interface.
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

START_S = 120.0
_MARK = "_lapse_elmo_started"  # on the package's module
_ATTEMPTS = 3  # to get a port: another process may take it between its choice and its use
_SCHEDULER = "import sys; from lapse_elmo.ps.scheduler import main; main(sys.argv[1:])"
# Reads what faulthandler writes when a process dies of a signal, and says it in one line.
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
        "often of timing; start the job again, or leave --ps away for the embedded server\\n"
    ).encode())
while os.read(0, 4096):
    pass
"""
_FIRST_KEYS = 4  # of each segment and for each node, pulled to try the package
_SOURCE = Path(__file__).resolve().parent.parent.parent


class PackageNode(ABC):
    """This process as one node of a package, with one worker (collective: every rank makes and closes its own).

    A process can do this once: neither package can be set up again after it was shut down.

    :param start_s: seconds within which the scheduler, and then all nodes, must be up.
    :ivar worker: the package's worker object.
    :raises ConfigError: if the package is not installed.
    :raises ServerError: if this process has been its node before.
    :raises LaunchError: if the scheduler does not start or cannot be reached. Nodes that do not come up in time end
        the job with one line.
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
            raise ServerError(f"{self.package} was started in this process before, which it does only once")
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
        # Some nodes come up but never answer: the time limit covers a first operation on all of them as well.
        self._pull_from_every_node()
        world.barrier()
        self._notify_watch(UP)
        crash_reporter.close()
        # Their threads must not outlive the interpreter; an error that all ranks raise leads there as well.
        atexit.register(self.close)
        self.closed = False

    def _pull_from_every_node(self) -> None:
        """Pull rows spread over each segment, so that every node is asked for some."""
        for segment in self.layout.segments:
            number = min(segment.num_rows, _FIRST_KEYS * self.world.size)
            rows = np.unique(np.linspace(0, segment.num_rows - 1, number).astype(np.int64))
            self.worker.pull(segment.keys(rows), np.empty((rows.size, segment.row_width), np.float32), False)

    @abstractmethod
    def load(self) -> ModuleType:
        """Import the package."""

    @abstractmethod
    def start(self, widths: torch.Tensor) -> tuple[Any, Any]:
        """The package's server and worker objects. ``widths``: float32 of each key's row, (num_keys,) int64."""

    @abstractmethod
    def stop(self) -> None:
        """Collective: shut the package down."""

    def close(self) -> None:
        """Collective: end the worker, the node and the scheduler, in this order."""
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
            "bindings, for this Python and torch; or leave --ps away for the embedded server"
        )

    def _start_scheduler(self, start_s: float) -> tuple[str, int]:
        """On rank 0: start it, wait until it listens; its address and port."""
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
            f"the scheduler of {self.package} cannot start at {address}: name an address of this host by "
            "DMLC_PS_ROOT_URI, if that is none; else see its error above"
        )

    def _address(self) -> str:
        """An address of this host under which the other ranks reach it."""
        address = own_address(self._hosts)
        if address is None:
            raise LaunchError("this host has no address to reach its scheduler by: name one by DMLC_PS_ROOT_URI")
        return address

    def _notify_watch(self, letter: bytes) -> None:
        """To the watch; on other ranks than 0 nothing."""
        if self._scheduler is not None:
            assert self._scheduler.stdin is not None
            self._scheduler.stdin.write(letter)
            self._scheduler.stdin.flush()


class _CrashReporter:
    """A process that says in one line of which signal this one dies, until :meth:`close`.

    C++ that crashes leaves no chance to say anything in Python. Of a SIGKILL, which launchers send to the ranks of a
    job that has failed elsewhere, nothing is said.
    """

    def __init__(self, package: str, where: str) -> None:
        # A socket with the smallest buffer: faulthandler, whose many small writes do not fit into it, and so the death
        # of this process wait until the line is said. Afterwards the launcher may end everything at once.
        self._socket, other = socket.socketpair()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _CRASH_REPORTER, package, where], stdin=other.fileno(),
                stdout=subprocess.PIPE, start_new_session=True,
            )
        assert self._process.stdout is not None
        self._process.stdout.read(1)  # it is ready
        self._before = faulthandler.is_enabled()
        faulthandler.enable(self._socket.fileno(), all_threads=False)

    def close(self) -> None:
        faulthandler.disable()
        if self._before:
            faulthandler.enable()
        self._socket.close()
        self._process.communicate()


class _Stdout:
    """Keeps standard output for Python, since the packages write their progress there.

    What their C++ writes is dropped, or shown if the packages' own PS_VERBOSE is set.
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
            f"{address} is no address of this host for the scheduler ({error.strerror}): give one by DMLC_PS_ROOT_URI"
        ) from None


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 2).close()
    except OSError:
        return False
    return True


def _own_address(address: str, port: int) -> str:
    """This host's address on the way to the scheduler."""
    try:
        with socket.create_connection((address, port), 10) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise LaunchError(
            f"the scheduler at {address}:{port} cannot be reached from {socket.gethostname()} "
            f"({error.strerror or error}): name an address of rank 0's host by DMLC_PS_ROOT_URI"
        ) from None
