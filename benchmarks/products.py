"""Compare prepacked.c with torch on the matrix products of the LSTM's steps: ``python -m benchmarks.products``.

Measures the (n, K) @ (K, N) products of a step with one thread, for each weight, size and precision, by both and by the
one that training chooses (lapse_elmo.model.prepacked.rows_prepacked). The two take turns within milliseconds, so that
other load on the machine affects both alike. Rates are those of the fastest turn, ratios medians of the turns, in CPU
time. The time of packing is printed separately: it is spent once per step, weight and direction. Torch packs in each
product.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lapse_elmo.config.cli import option, parse
from lapse_elmo.config.training import PRESETS
from lapse_elmo.devices import speed_up_float32
from lapse_elmo.model.prepacked import Kernels, PrepackedWeight, describe, kernels, rows_prepacked
from lapse_elmo.model.products import PRECISIONS, Matmul, TorchWeight, cpu_multiplies_bf16


@dataclass(frozen=True)
class ProductsOptions:
    """Sizes and repeats of the benchmark."""

    sizes: tuple[str, ...] = option(("small", "original"), help="small, original")
    precisions: tuple[str, ...] = option(PRECISIONS[: 1 + cpu_multiplies_bf16()], help="fp32, bf16")
    rows: tuple[int, ...] = option((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), help="n, rows of the first matrix")
    repeats: int = option(5, help="number of turns")


@dataclass(frozen=True)
class Weight:
    """One of the four weights of an LSTM step.

    Attributes:
        name: What it computes.
        num_terms: K, its rows.
        num_columns: N, its columns.
        strided: Whether it is a transposed view.
        adds: Whether the products are added to the output.
    """

    name: str
    num_terms: int
    num_columns: int
    strided: bool
    adds: bool

    def new(self, storage: torch.dtype) -> Tensor:
        """Make a random weight (K, N)."""
        if self.strided:
            return torch.randn(self.num_columns, self.num_terms).to(storage).t()
        return torch.randn(self.num_terms, self.num_columns).to(storage)


def weights(size: str) -> list[Weight]:
    """Return the weights of a model size."""
    width, cells = PRESETS[size]["projection_size"], PRESETS[size]["cell_size"]
    return [
        Weight("state to gates", width, 4 * cells, strided=True, adds=True),
        Weight("projection", cells, width, strided=True, adds=False),
        Weight("gates to state", 4 * cells, width, strided=False, adds=False),
        Weight("state to cells", width, cells, strided=False, adds=False),
    ]


def seconds(run: Callable[[], object], at_least_s: float = 5e-4) -> float:
    """Measure the CPU seconds of one call; short calls are repeated."""
    count, start = 0, time.process_time()
    while True:
        run()
        count, now = count + 1, time.process_time()
        if now - start > at_least_s:
            return (now - start) / count


def compare(found: Kernels, weight: Weight, storage: torch.dtype, options: ProductsOptions) -> list[float]:
    """Print a line of the table; returns the speed of the chosen product relative to torch, by number of rows."""
    second = weight.new(storage)
    prepacked, by_torch = PrepackedWeight(found, second), TorchWeight(Matmul(storage), second)
    pack_s = min(seconds(lambda: PrepackedWeight(found, second)) for _ in range(options.repeats))
    chosen, ratios, parts = rows_prepacked(storage, weight.strided), [], []
    for num_rows in options.rows:
        first = torch.randn(num_rows, weight.num_terms).to(storage)
        out = torch.zeros(num_rows, weight.num_columns, dtype=storage)
        runs = [
            (lambda factor=factor: factor.addmm_into(out, first) if weight.adds else factor.mm_into(out, first))  # noqa: B023
            for factor in (prepacked, by_torch)
        ]
        for run in runs:
            run()
        turns = [[seconds(run) for run in runs] for _ in range(options.repeats)]
        ours, theirs = (min(times) for times in zip(*turns, strict=True))
        ratio = statistics.median(t / o for o, t in turns)
        ratios.append(ratio if num_rows in chosen else 1.0)
        rate = 2e-9 * num_rows * weight.num_terms * weight.num_columns
        parts.append(f"{rate / ours:>5.0f}{rate / theirs:>5.0f}{ratio:>6.2f}{' ' if num_rows in chosen else '-'}")
    name = f"{weight.name}, {weight.num_terms} x {weight.num_columns}"
    print(f"{name:<30}{str(storage).removeprefix('torch.'):<9}{1e6 * pack_s:>7.0f} {''.join(parts)}", flush=True)
    return ratios


def main(argv: list[str]) -> None:
    """Print the table and the worst ratio."""
    options = parse(
        ProductsOptions, argv, prog="python -m benchmarks.products", description="Time the products of few rows."
    )
    speed_up_float32()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    print("GFLOP/s of prepacked.c and of torch, and their ratio; - where torch is chosen. Packing in us.")
    print(f"{'weight':<30}{'':<9}{'packing':>7} " + "".join(f"{f'n = {n}':>16} " for n in options.rows))
    worst: list[tuple[float, str]] = []
    for precision in options.precisions:
        storage = torch.bfloat16 if precision == "bf16" else torch.float32
        found = kernels(storage)
        print(describe(precision))
        for size in options.sizes if found is not None else ():
            for weight in weights(size):
                assert found is not None
                ratios = compare(found, weight, storage, options)
                at = f"{size}, {weight.name}, {precision}, n = "
                worst += [(ratio, f"{at}{n}") for ratio, n in zip(ratios, options.rows, strict=True)]
    for ratio, where in sorted(worst)[:5]:
        print(f"lowest speed of the chosen product relative to torch: {ratio:.2f}, {where}")


if __name__ == "__main__":
    main(sys.argv[1:])
