"""Measure a card for ``benchmarks/gpu.py``: ``python -m benchmarks.gpu_device cuda`` prints name and rates as JSON.

It is a program of its own, so that a card that hangs ends with the time of this part.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def matrix_rates(device: torch.device, size: int = 8192) -> dict[str, float]:
    """Return the rates of square products in FLOP/s, by precision: the best of five."""
    rates = {}
    size = size if device.type == "cuda" else 512
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        times = []
        for _ in range(6):
            synchronize(device)
            start = time.perf_counter()
            torch.mm(first, second)
            synchronize(device)
            times.append(time.perf_counter() - start)
        rates[name] = 2.0 * size**3 / min(times[1:])
    torch.backends.cuda.matmul.allow_tf32 = False
    return rates


def synchronize(device: torch.device) -> None:
    """Wait for all work on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Sample the card's memory in use, by all processes, while the context is open; yields a function of the peak."""
    peak, over = [0.0], threading.Event()

    def sample() -> None:
        while not over.wait(0.1):
            free, total = torch.cuda.mem_get_info(device)
            peak[0] = max(peak[0], float(total - free))

    thread = threading.Thread(target=sample, daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield lambda: peak[0]
    finally:
        over.set()
        if thread.is_alive():
            thread.join(2.0)  # a card that hangs keeps it


def main(kind: str) -> None:
    """Print the name of the device, its memory in bytes, and its rates."""
    device = torch.device(kind)
    if kind == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use here: --device cpu tries the program without one")
    about = {"device": "CPU", "gpus": 0}
    if kind == "cuda":
        about = {"device": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    print(json.dumps({**about, "torch": torch.__version__, "rates": matrix_rates(device)}))


if __name__ == "__main__":
    main(sys.argv[1])
