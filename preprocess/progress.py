"""Show progress and print summaries on rank 0."""

from __future__ import annotations

import sys

from tqdm import tqdm

from lapse_elmo.metrics.terminal import stderr_is_terminal
from lapse_elmo.mpi.world import World


def progress_bar(world: World, total: int, unit: str, description: str) -> tqdm:
    """Return a progress bar for rank 0's share of the work. It is shown only on rank 0 and if stderr is a terminal."""
    silent = world.rank != 0 or not stderr_is_terminal()
    return tqdm(total=total, unit=unit, unit_scale=True, desc=description, disable=silent, file=sys.stderr, leave=False)


def print_once(world: World, text: str) -> None:
    """Print ``text`` on rank 0."""
    if world.rank == 0:
        print(text, flush=True)
