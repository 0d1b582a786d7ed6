"""Two halves of a computation side by side: the directions of the LSTM, the halves of the softmax's targets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")


def run_two_threads(function: Callable[[int], T], device: torch.device, label: str) -> tuple[T, T]:
    """``function(0)`` and ``function(1)``, without gradient recording; the halves must not write to the same memory.

    With two or more of torch's threads on the CPU each half runs on a thread of its own with half of torch's. Matrix
    products that are small, one after another, and pointwise parts in between gain more from this than from
    threads within each of them. The results have the same bits either way. ``label`` names it in a profile. Calls
    do not nest.
    """
    num_threads = torch.get_num_threads()

    def run(half: int, threads: int) -> T:
        with torch.no_grad(), torch.profiler.record_function(label):  # a new thread inherits no mode
            if threads:
                torch.set_num_threads(threads)
            return function(half)

    if device.type != "cpu" or num_threads == 1:
        return run(0, 0), run(1, 0)
    try:
        other = _second_thread().submit(run, 1, num_threads // 2)
        try:
            return run(0, num_threads - num_threads // 2), other.result()
        finally:
            wait([other])  # also after an error: it may still write to what the caller gave it
    finally:
        torch.set_num_threads(num_threads)


@functools.cache
def _second_thread() -> ThreadPoolExecutor:
    """One thread for the life of the process: torch's threads below it are not made anew each time."""
    return ThreadPoolExecutor(1, "second half")
