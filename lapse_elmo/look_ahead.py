"""Announce the batches of later steps to the server."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from lapse_elmo.batches import Batch
from lapse_elmo.step import AnnouncedBatch, TrainingStep


def look_ahead(
    source: Iterator[tuple[Batch, ...]], step_once: TrainingStep, lookahead: int
) -> Iterator[list[AnnouncedBatch]]:
    """Yield the batches of each step, announced to the server ``lookahead`` clocks before."""
    announced: deque[list[AnnouncedBatch]] = deque()
    for clock, batches in enumerate(source):
        announced.append([step_once.announce(batch, clock) for batch in batches])
        if len(announced) > lookahead:
            yield announced.popleft()
    yield from announced
