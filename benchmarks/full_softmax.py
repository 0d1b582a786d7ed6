"""Measure the full softmax of evaluation over ELMo's 793,471 classes: ``python -m benchmarks.full_softmax``.

Prints GFLOP/s next to those of the bare matrix products, and the peak memory above that of the inputs. The rows come
in chunks as from the server, weights followed by accumulators, but all from one buffer: no table is held.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.step import peak_bytes, run_halves
from lapse_elmo.config.cli import option, parse
from lapse_elmo.devices import speed_up_float32
from lapse_elmo.model.full_softmax import CLASS_BLOCK, TARGET_BLOCK, full_softmax_nll

_CHUNK = 16_384  # rows


@dataclass(frozen=True)
class FullSoftmaxOptions:
    """Sizes of the benchmark."""

    num_classes: int = option(793_471, help="V")
    projection_sizes: tuple[int, ...] = option((128, 512), help="D")
    num_targets: int = option(2048, help="context vectors; each chunk of rows is copied once for all")
    threads: tuple[int, ...] = option((1,), help="torch threads to measure with")


def chunks(num_classes: int, buffer: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield rows as RowTable.chunks does."""
    for first in range(0, num_classes, _CHUNK):
        yield first, buffer[: min(_CHUNK, num_classes - first), : size + 1]


def products(context: Tensor, weight: Tensor, num_classes: int) -> None:
    """Compute only the matrix products of the full softmax."""

    def half(number: int) -> None:
        logits = torch.empty(TARGET_BLOCK, CLASS_BLOCK)
        for _ in range(num_classes // CLASS_BLOCK):
            for some in context.chunk(2)[number].split(TARGET_BLOCK):
                torch.mm(some, weight.t(), out=logits[: len(some)])

    run_halves(half)


def peak_of(context: Tensor, buffer: Tensor, target: Tensor) -> int:
    """Measure the peak memory in bytes above that of the arguments. It does not depend on the number of chunks."""
    few = 3 * _CHUNK

    def run() -> None:
        full_softmax_nll(context, chunks(few, buffer, context.shape[1]), target % few)

    return peak_bytes(run)


def main(argv: list[str]) -> None:
    """Print the table."""
    options = parse(FullSoftmaxOptions, argv, prog="python -m benchmarks.full_softmax", description="Time evaluation.")
    speed_up_float32()
    print("threads    D        N  tokens/s  GFLOP/s  products' GFLOP/s  peak memory")
    for threads in options.threads:
        torch.set_num_threads(threads)
        clock = time.process_time if threads == 1 else time.perf_counter
        for size in options.projection_sizes:
            generator = torch.Generator().manual_seed(1)
            count = options.num_targets
            buffer = torch.randn(_CHUNK, 2 * (size + 1), generator=generator)
            context = torch.randn(count, size, generator=generator)
            target = torch.randint(options.num_classes, (count,), generator=generator)
            flops = 2.0 * count * size * options.num_classes
            block = buffer[:CLASS_BLOCK, :size].contiguous()
            for _ in range(2):  # oneDNN compiles code for the shapes in the first round
                start = clock()
                full_softmax_nll(context, chunks(options.num_classes, buffer, size), target)
                ours = clock() - start
                start = clock()
                products(context, block, options.num_classes)
                products_only = clock() - start
            peak = peak_of(context, buffer, target)
            print(
                f"{threads:7}{size:5}{count:9,}{count / 2 / ours:10,.0f}{flops / ours / 1e9:9.1f}"
                f"{flops / products_only / 1e9:19.1f}{peak / 1e6:9.0f} MB", flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
