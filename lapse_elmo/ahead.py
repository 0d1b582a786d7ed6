"""Work ahead of the caller: a thread makes items early, and items are announced some clocks before they are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def read_ahead(source: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """Yield the items of ``source``, which a thread makes up to ``depth`` items ahead.

    An exception of ``source`` is raised where its item would have been yielded.
    """
    done = object()
    with ThreadPoolExecutor(1, "reader") as reader:  # a single thread keeps the order of the items
        made = deque(reader.submit(next, source, done) for _ in range(depth))
        while (item := made.popleft().result()) is not done:
            made.append(reader.submit(next, source, done))
            yield item  # type: ignore[misc]


def announce_ahead(source: Iterator[S], announce: Callable[[S, int], T], lookahead: int) -> Iterator[T]:
    """Yield what ``announce(item, clock)`` returns for each item of ``source``, called ``lookahead`` items earlier.

    The clock of an item is its number from 0.
    """
    announced: deque[T] = deque()
    for clock, item in enumerate(source):
        announced.append(announce(item, clock))
        if len(announced) > lookahead:
            yield announced.popleft()
    yield from announced
