"""Hand the results of all ranks to rank 0, which writes them, one item at a time: no rank holds the results of all."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import TypeVar

from lapse_elmo.errors import UserError
from lapse_elmo.mpi.world import World

T = TypeVar("T")

_END = b""  # after the last item of a rank; no item is pickled to nothing


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
            while (data := world.receive(rank)) != _END:
                guarded(pickle.loads(data))
    else:
        for item in items:
            world.send(pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL), 0)
        world.send(_END, 0)

    def end() -> None:
        if error is not None:
            raise error

    world.agree(end)
