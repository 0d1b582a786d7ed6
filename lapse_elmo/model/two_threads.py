"""Run two independent parts of a computation in parallel: the LSTM's directions, or halves of the full softmax."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")


def run_two_threads(function: Callable[[int], T], device: torch.device, label: str) -> tuple[T, T]:
    """Return ``function(0)`` and ``function(1)``, computed in parallel on the CPU and without recording gradients.

    If torch has at least two threads, each part runs on its own thread and gets half of torch's threads. A sequence of
    small matrix products and pointwise kernels gains more from this than from threads within each operation. The
    results are bitwise the same either way.

    Args:
        function: Computes part 0 or 1; the parts must not write to the same memory. Must not call this function.
        device: Where ``function`` computes. On a GPU, the parts run one after the other.
        label: Name of each part in a profile.
    """
    num_threads = torch.get_num_threads()

    def run(part: int, threads: int) -> T:
        with torch.no_grad(), torch.profiler.record_function(label):  # a new thread does not inherit no_grad
            if threads:
                torch.set_num_threads(threads)
            return function(part)

    if device.type != "cpu" or num_threads == 1:
        return run(0, 0), run(1, 0)
    try:
        other = _second_thread().submit(run, 1, num_threads // 2)
        try:
            return run(0, num_threads - num_threads // 2), other.result()
        finally:
            wait([other])  # also after an error, since it may still write to the caller's tensors
    finally:
        torch.set_num_threads(num_threads)


@functools.cache
def _second_thread() -> ThreadPoolExecutor:
    """Return a pool with one thread that lives as long as the process, so that its OpenMP threads are reused."""
    os.register_at_fork(after_in_child=_second_thread.cache_clear)  # a forked process has no thread but its first
    return ThreadPoolExecutor(1, "second part")
