"""A progress bar on rank 0 when somebody looks, and the same kind of summary line everywhere."""

from __future__ import annotations

import sys

from tqdm import tqdm

from lapse_elmo.mpi.world import World


def bar(world: World, total: int, unit: str, description: str) -> tqdm:
    """A bar on the standard error of rank 0 for its own share of the work; silent if that is no terminal."""
    silent = world.rank != 0 or not sys.stderr.isatty()
    return tqdm(total=total, unit=unit, unit_scale=True, desc=description, disable=silent, file=sys.stderr, leave=False)


def say(world: World, text: str) -> None:
    """Print ``text`` once for the whole job."""
    if world.rank == 0:
        print(text, flush=True)
