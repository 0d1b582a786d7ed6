"""Hand the results of all ranks to rank 0, which writes them, one item at a time: no rank holds the results of all."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from lapse_elmo.errors import UserError
from lapse_elmo.mpi.world import World

T = TypeVar("T")

_LENGTH, _DATA = 31, 32  # message tags
_END = -1


def hand_to_first(world: World, items: Sequence[T], take: Callable[[T], None]) -> None:
    """Have rank 0 call ``take`` with every item of rank 0, then of rank 1, and so on (collective).

    Items may be anything that pickles.

    Raises:
        UserError: On every rank, the first one that ``take`` raised; later items are dropped.
    """
    error: UserError | None = None

    def guarded(item: T) -> None:
        nonlocal error
        if error is None:
            try:
                take(item)
            except UserError as caught:
                error = caught

    if world.rank == 0:
        for item in items:
            guarded(item)
        for rank in range(1, world.size):
            _receive(world, rank, guarded)
    else:
        _send(world, items)

    def end() -> None:
        if error is not None:
            raise error

    world.agree(end)


def _send(world: World, items: Sequence[T]) -> None:
    assert world.comm is not None
    for item in items:
        data = bytearray(pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL))
        world.wait(world.comm.Isend(np.array([len(data)], np.int64), 0, _LENGTH))
        world.wait(world.comm.Isend(data, 0, _DATA))
    world.wait(world.comm.Isend(np.array([_END], np.int64), 0, _LENGTH))


def _receive(world: World, rank: int, take: Callable[[T], None]) -> None:
    assert world.comm is not None
    length = np.empty(1, np.int64)
    while True:
        world.wait(world.comm.Irecv(length, rank, _LENGTH))
        if length[0] == _END:
            return
        data = bytearray(int(length[0]))
        world.wait(world.comm.Irecv(data, rank, _DATA))
        take(pickle.loads(data))
