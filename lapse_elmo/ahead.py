"""Read-ahead: a thread makes items while the caller works on earlier ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
