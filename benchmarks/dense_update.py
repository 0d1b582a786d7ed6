"""Measure a step of the dense parameters on one thread, in C and in torch: ``python -m benchmarks.dense_update``.

Prints milliseconds of processor time, least and median of alternating repeats, for one of two ranks of a node: adding
up its slice of both gradients with the squares for the norms, and Adam's update of the slice.
"""

from __future__ import annotations

import os
import statistics
import time

import torch

from lapse_elmo import native
from lapse_elmo.config.training import PRESETS
from lapse_elmo.memory import dense_size
from lapse_elmo.model.dense import Rates, add_up, update

_REPEATS = 8
_NUMBERS = 2_000_000  # updated at least in each repeat
_RANKS = 2


def measure(numbers: int) -> dict[str, list[tuple[float, float]]]:
    """Return for C ("1") and torch ("0") the milliseconds of both parts in each repeat, for slices of ``numbers``."""
    gradients, weights = torch.randn(_RANKS, numbers) * 1e-3, torch.randn(numbers)
    state = [torch.zeros(numbers), torch.zeros(numbers)]
    calls = max(1, _NUMBERS // numbers)
    found: dict[str, list[tuple[float, float]]] = {"1": [], "0": []}
    for _ in range(_REPEATS):
        for switch, times in found.items():
            os.environ[native.SWITCH] = switch
            begin = time.process_time()
            for _ in range(calls):
                add_up(gradients, _RANKS, True, True)
            middle = time.process_time()
            for _ in range(calls):
                update("adam", weights, gradients[0], state, Rates(0.9, 1e-3, 1e-7, 0.5))
            end = time.process_time()
            times.append(((middle - begin) / calls * 1e3, (end - middle) / calls * 1e3))
    return found


def main() -> None:
    """Print a line for each size, in C and in torch."""
    torch.set_num_threads(1)
    print(f"{'':10}{'':8}{'add up, ms':>20}{'update, ms':>20}   (least, median)")
    for name, sizes in PRESETS.items():
        numbers = dense_size(sizes["projection_size"], sizes["cell_size"], sizes["num_layers"])
        for switch, times in measure(numbers // _RANKS).items():
            parts = (f"{min(part):10.2f}{statistics.median(part):10.2f}" for part in zip(*times, strict=True))
            print(f"{name:10}{'C' if switch == '1' else 'torch':8}{''.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
