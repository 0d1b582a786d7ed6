"""Saves and restores without training, on ranks: ``restoring.py REPORT WORD...``, where a word is one of these.

``nodes=N``         splits the ranks into N nodes (a later number must be larger)
``save=FOLDER``     saves known values and sentences as a run in FOLDER, from an uneven distribution of the rows
``restore=FOLDER``  restores the run in FOLDER into a new server, and saves it again as a run in FOLDER.again

REPORT gets, for each ``restore``, a list by rank of what the rank read of the checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import torch

from lapse_elmo import checkpoint
from lapse_elmo.config.cli import as_tables
from lapse_elmo.config.training import parse_train
from lapse_elmo.corpus.shards import WorkerPart
from lapse_elmo.cursor import Cursor, Position
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters
from tests.training.corpora import save_once

NUM_CLASSES, NUM_SENTENCES = 6007, 1003
EPOCH = np.delete(np.arange(NUM_SENTENCES), np.arange(300, 700, 7))  # what was left of it when a run was resumed
LEFT = EPOCH[np.random.default_rng(5).random(EPOCH.size) < 0.6]
OPTIONS = (
    "--projection-size", "64", "--cell-size", "256", "--threads", "1", "--row-accumulators", "element",
    "--frequent-rows", "100",
)


class FixedCursor:
    """A stand-in for a Cursor within an epoch, at the place of a rank."""

    position = Position(1, 0, 1)
    step = 1

    def __init__(self, world: World) -> None:
        part = WorkerPart.of(EPOCH.size, world.rank, world.size)
        self._own = EPOCH[part.first : part.end]

    def sentences(self) -> tuple[np.ndarray, np.ndarray]:
        return self._own, np.intersect1d(self._own, LEFT)


def known_rows(number: int, num_rows: int, width: int) -> np.ndarray:
    """Return the known values of a table: no two are alike."""
    return np.arange(num_rows * width, dtype=np.float32).reshape(num_rows, width) + number * 2**22


def made(world: World) -> Parameters:
    return Parameters(parse_train([*OPTIONS]), NUM_CLASSES, world, torch.device("cpu"))


def save(folder: Path, parameters: Parameters, world: World) -> None:
    entries = {
        "vocabulary_sha256": "", "num_classes": NUM_CLASSES, "config": as_tables(parameters.config), "state": {},
        "corpus": {"training": "", "held-out": ""}, "results": {},
    }
    save_once(folder, parameters, cast("Cursor", FixedCursor(world)), entries, world)


def save_known(folder: Path, world: World) -> None:
    """Save from a server in which a third of the rows is on the last node, in addition to its own."""
    parameters = made(world)
    for number, table in enumerate(parameters.tables):
        rows = np.arange(table.segment.num_rows)[world.rank :: world.size]
        values = known_rows(number, table.segment.num_rows, table.segment.row_width)[rows]
        table.server.set(table.segment.keys(rows), values)
    parameters.sync_parameters()
    if world.rank == world.size - 1:
        for table in parameters.tables:
            table.server.localize(table.segment.keys(np.arange(0, table.segment.num_rows, 3)))
    with torch.no_grad():
        for place, tensor in enumerate(parameters.dense_tensors().values()):
            tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float32).view_as(tensor) + place)
    save(folder, parameters, world)
    parameters.server.close()


def restore(folder: Path, world: World) -> dict[str, Any]:
    parameters = made(world)  # whose dense parameters are random, different from the known ones
    path = checkpoint.find(folder)
    before = read_bytes()
    with Opens(path) as opens:
        files = checkpoint.OpenFiles(path)
        manifest = checkpoint.verified(files, world)
        cursor = checkpoint.read_cursor(path, manifest, NUM_SENTENCES, world)
        checkpoint.restore(files, manifest, parameters, world)
    num_bytes = read_bytes() - before
    save(folder.with_name(f"{folder.name}.again"), parameters, world)
    parameters.server.close()
    assert cursor.rest is not None and cursor.rest.num_all == LEFT.size
    found: dict[str, Any] = {"opens": opens.names, "bytes": num_bytes, "own": None}
    found["rest"] = cursor.rest.numbers.tolist()
    if cursor.own is not None and cursor.own_left is not None:
        found |= {"own": cursor.own.numbers.tolist(), "own_left": cursor.own_left.tolist()}
    return found


class Opens:
    """A context that records which files of ``folder`` this process opens, by Python or by HDF5."""

    def __init__(self, folder: Path) -> None:
        self.names: list[str] = []
        self._folder = folder
        self._active = False
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            self._note(arguments[0])

    def _note(self, name: str | os.PathLike[str]) -> None:
        if self._active and Path(name).parent == self._folder:
            self.names.append(Path(name).name)

    def __enter__(self) -> Opens:
        note, self._active, self._h5py_file = self._note, True, h5py.File

        class File(h5py.File):
            def __init__(self, name: Any, *arguments: Any, **options: Any) -> None:
                if isinstance(name, str | os.PathLike):  # not a file that is open already
                    note(name)
                super().__init__(name, *arguments, **options)

        h5py.File = File
        return self

    def __exit__(self, *_: object) -> None:
        self._active, h5py.File = False, self._h5py_file


def read_bytes() -> int:
    """Return the bytes that this process has read from files so far, from the page cache or the disk."""
    return int(Path("/proc/self/io").read_text().split()[1])


def main(argv: list[str], enter: Callable[[], World]) -> int:
    report, *words = argv
    world, reports = enter(), []
    torch.set_num_threads(1)
    for word in words:
        name, _, value = word.partition("=")
        if name == "nodes":
            world.split(int(value))
        elif name == "save":
            save_known(Path(value), world)
        else:
            reports.append(world.allgather(restore(Path(value), world)))
    if world.rank == 0:
        Path(report).write_text(json.dumps(reports))
    return 0


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="restoring")
