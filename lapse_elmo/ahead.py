"""Items that a thread makes while the caller works on those before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(source: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """Yield the items of ``source``, of which a thread makes ``depth`` ahead."""
    done = object()
    with ThreadPoolExecutor(1, "reader") as reader:  # one thread: the order stays, and so do errors
        made = deque(reader.submit(next, source, done) for _ in range(depth))
        while (item := made.popleft().result()) is not done:
            made.append(reader.submit(next, source, done))
            yield item  # type: ignore[misc]
