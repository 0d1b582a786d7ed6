"""The modules that an object passes through, found by tracing real calls.

As a program, ``walks.py FOLDER``, on two ranks that are a node each, it traces rows: they move to the node that
announces them, are used there, and are then used by their former node. Each rank writes a file of modules to FOLDER.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, cast

import numpy as np
import torch

import lapse_elmo
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.rules import Rule
from lapse_elmo.row_update import RowGradients, RowUpdate
from lapse_elmo.tables import RowTable

_FOLDER = f"{Path(lapse_elmo.__file__).parent}/"
_DEPTH = 4  # of containers within containers


class Trace:
    """A context that collects the modules on a walk.

    A module is on the walk if one of its functions is given the object's data or returns them while it runs beneath a
    function of ``roots`` or in a thread of ``threads``, or if it calls a root. What only runs at the same time, for
    instance clocks, meters and notes for the watchdog, has no data.

    Attributes:
        modules: The modules, as ``ps/rows`` for lapse_elmo/ps/rows.py.

    Args:
        roots: Functions where the walk enters a thread.
        threads: Beginnings of the names of threads that belong to the walk as a whole.
        end: The function with whose return the walk ends; None for the returns of the roots.
        data: What counts as data: these types, arrays and tensors of several elements, and what contains them.
    """

    def __init__(
        self, roots: Collection[Callable[..., Any]], threads: Collection[str] = (),
        end: Callable[..., Any] | None = None, data: tuple[type, ...] = (),
    ) -> None:
        self.modules: set[str] = set()
        self._roots = {_code(root) for root in roots}
        self._threads = tuple(threads)
        self._end = None if end is None else _code(end)
        self._data = data
        self._local = threading.local()

    def __enter__(self) -> Trace:
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _profile(self, frame: FrameType, event: str, result: Any) -> None:
        code, local = frame.f_code, self._local
        if event not in ("call", "return") or not code.co_filename.startswith(_FOLDER):
            return
        if not hasattr(local, "depth"):
            local.whole = threading.current_thread().name.startswith(self._threads) if self._threads else False
            local.depth = 0  # of roots that are running in this thread
        if event == "call" and code in self._roots:
            if not local.depth and frame.f_back is not None:
                self._add(frame.f_back.f_code)
            local.depth += 1
        if local.depth or local.whole:
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            values = (frame.f_locals.get(name) for name in names if name != "self") if event == "call" else [result]
            if any(self._has_data(value) for value in values):
                self._add(code)
        if event == "return" and code is self._end:
            local.depth = 0
        elif event == "return" and code in self._roots:
            local.depth = max(local.depth - 1, 0)

    def _has_data(self, value: Any, depth: int = _DEPTH) -> bool:
        if isinstance(value, np.ndarray):
            return value.ndim > 0 and value.size > 1
        if isinstance(value, torch.Tensor):
            return value.numel() > 1
        return isinstance(value, self._data) or (
            depth > 0 and any(self._has_data(part, depth - 1) for part in _parts(value))
        )

    def _add(self, code: CodeType) -> None:
        if code.co_filename.startswith(_FOLDER):
            self.modules.add(code.co_filename.removeprefix(_FOLDER).removesuffix(".py"))


def _code(function: Callable[..., Any]) -> CodeType:
    return cast(FunctionType, getattr(function, "__func__", function)).__code__


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, field.name) for field in dataclasses.fields(value))


def trace_row(argv: list[str], enter: Callable[[], World]) -> None:
    """Trace two rows that are relocated from node 0 to node 1, used there, and then used by a worker of node 0."""
    world = enter()
    world.split(2)
    layout = Layout.of(("table", 4, 3, Rule("adagrad")))
    rows = np.arange(0, 4, 2)  # their home is node 0
    roots = (RowTable.intent, RowTable.pull, RowUpdate.put, RowUpdate.add_up, RowUpdate.push)
    with Trace(roots, threads=["manager"]) as trace:
        server = EmbeddedServer(world, layout, technique="relocation")
        server.set_rate("table", 0.1)
        table = RowTable(server, layout["table"], 1.0)
        update = RowUpdate(world, table, most_rows=4, shared=False)
        for user in (1, 0):
            if world.rank == user:
                _use(table, rows, update, announced=user == 1)
            server.barrier()
        server.close()
    (Path(argv[0]) / f"{world.rank}.json").write_text(json.dumps(sorted(trace.modules)))


def _use(table: RowTable, rows: np.ndarray, update: RowUpdate, *, announced: bool) -> None:
    if announced:
        table.intent(rows, 0, 1)
        while not table.server.is_local("table")[rows].all():  # type: ignore[index]
            time.sleep(0.001)
    pulled = table.pull(rows)
    update.put([RowGradients(pulled.keys, torch.ones(rows.size, table.size), 1.0)])
    update.add_up()
    update.push(1.0)


if __name__ == "__main__":
    launch(trace_row, sys.argv[1:], prog="walks")
