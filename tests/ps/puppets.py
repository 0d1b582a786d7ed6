"""Ranks whose server a test drives from outside, one call at a time: ``puppets.py ADDRESS NODES`` as an MPI job.

Each rank connects to the Unix socket ADDRESS, sends its number, and then runs what it receives: (method, arguments) of
:class:`Puppet`. It answers with the result. :class:`Stage` is the other end.
"""

from __future__ import annotations

import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.api import DONE, ParameterServer
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.sampling import Sampler
from tests import mpi

ANSWER_S = 15  # far more than any call takes on a busy machine


class Puppet:
    """The calls that a rank can be asked for."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.server: ParameterServer
        self._outs: dict[int, np.ndarray] = {}

    def open(self, layout: Layout, sampled: tuple[str, Sampler] | None, technique: str) -> None:
        self.server = EmbeddedServer(self.world, layout, sampled, technique=technique)

    def call(self, verb: str, *arguments: Any) -> Any:
        """Call a method of the server and return its result."""
        return getattr(self.server, verb)(*arguments)

    def pull(self, keys: np.ndarray, width: int) -> np.ndarray:
        out = np.full((keys.size, width), np.nan, np.float32)
        self.server.pull(keys, out)
        return out

    def begin_pull(self, keys: np.ndarray, width: int) -> tuple[int, np.ndarray | None]:
        """Begin a pull; return its ticket and, if it is complete already, the rows."""
        out = np.full((keys.size, width), np.nan, np.float32)
        ticket = self.server.pull_async(keys, out)
        if ticket == DONE:
            return ticket, out
        self._outs[ticket] = out
        return ticket, None

    def end_pull(self, ticket: int) -> np.ndarray:
        self.server.wait(ticket)
        return self._outs.pop(ticket)

    def pull_sample(self, handle: int, count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        keys, out = np.empty(count, np.int64), np.full((count, width), np.nan, np.float32)
        self.server.pull_sample(handle, keys, out)
        return keys, out


class Stage:
    """A job of puppets as the test sees it; a context that ends it. A job that failed is restarted."""

    def __init__(self, num_ranks: int, nodes: int) -> None:
        self.num_ranks, self.nodes = num_ranks, nodes
        self._connections: list[Connection] = []
        self._job: mpi.RunningJob | None = None

    def start(self) -> None:
        """Start the job unless it is running."""
        if self._job is not None:
            return
        with tempfile.TemporaryDirectory(prefix="puppets-") as folder, socket.socket(socket.AF_UNIX) as listener:
            address = f"{folder}/socket"  # the path of a Unix socket must be short
            listener.bind(address)
            listener.listen(self.num_ranks)
            listener.settimeout(4 * ANSWER_S)
            self._job = mpi.start(self.num_ranks, [Path(__file__), address, str(self.nodes)], fork=True)
            self._connections = [Connection(listener.accept()[0].detach()) for _ in range(self.num_ranks)]
            by_rank = {self._answer(connection): connection for connection in self._connections}
            self._connections = [by_rank[rank] for rank in range(self.num_ranks)]

    def node_of(self, rank: int) -> int:
        return rank * self.nodes // self.num_ranks

    def on(self, rank: int, method: str, *arguments: Any) -> Any:
        """Call a method on one rank; return its result."""
        self._send(rank, method, arguments)
        return self._answer(self._connections[rank])

    def on_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call the same method on all ranks at once; return the results by rank."""
        return self.each(method, [arguments] * self.num_ranks)

    def each(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Call a method on all ranks at once, with arguments by rank; return the results by rank."""
        for rank, own in enumerate(arguments):
            self._send(rank, method, own)
        return [self._answer(connection) for connection in self._connections]

    def _send(self, rank: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            self._connections[rank].send((method, arguments))
        except OSError as error:
            self._broke(repr(error))

    def _answer(self, connection: Connection) -> Any:
        try:
            if connection.poll(ANSWER_S):
                return connection.recv()
            self._broke(f"no answer after {ANSWER_S} s")
        except (EOFError, OSError) as error:
            self._broke(f"the ranks are gone ({error!r})")

    def _broke(self, problem: str) -> NoReturn:
        assert self._job is not None
        output = "\n".join(self._job.text())
        self.close()
        raise AssertionError(f"{problem}; the job says:\n{output}")

    def close(self) -> None:
        """End the job."""
        if self._job is not None:
            self._job.close()
        for connection in self._connections:
            connection.close()
        self._job, self._connections = None, []

    @property
    def running(self) -> bool:
        return self._job is not None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main(argv: list[str], join: Callable[[], World]) -> None:
    address, nodes = argv
    world = join()
    if int(nodes) > 1:
        world.split(int(nodes))
    puppet = Puppet(world)
    with Client(address) as connection:
        connection.send(world.rank)
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(puppet, method)(*arguments))


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="puppets.py")
