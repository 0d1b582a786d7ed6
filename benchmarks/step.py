"""The arithmetic of a training step against its peers: AllenNLP's ElmoLstm, and a sampled softmax by plain autograd.

Forward and backward pass with all gradients, at the small sizes. The variants of a row take turns, so that whatever
else the machine does hits all of them alike; the table shows each one's median, in words a second, and the median of
the ratios of neighbouring runs. Seconds are the process's own CPU time with one thread and wall time with more, which
other work on the cores disturbs. Run it as ``python -m benchmarks.step``; it takes about a minute on idle cores.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lapse_elmo.config.cli import option, parse
from lapse_elmo.model import reference
from lapse_elmo.model.initial_values import initialize_lstm
from lapse_elmo.model.lstm import FusedElmoLstm
from lapse_elmo.model.softmax import sampled_softmax_nll

MEAN_LENGTH, SPREAD, LONGEST = 25.0, 0.55, 250


@dataclass(frozen=True)
class StepOptions:
    """Sizes and repeats of the benchmark."""

    projection_size: int = option(128, help="D")
    cell_size: int = option(512, help="C")
    num_layers: int = option(2, help="L")
    batch_sizes: tuple[int, ...] = option((64, 128), help="sentences a batch")
    num_targets: int = option(3200, help="targets of one direction, N")
    num_samples: int = option(8192, help="negative samples, S")
    threads: tuple[int, ...] = option((1,), help="torch threads to measure with; more than 1 needs idle cores")
    repeats: int = option(3, help="runs of each variant, after one that is thrown away")


@dataclass(frozen=True)
class Row:
    """One line of the table: two variants of the same work on ``num_words`` words."""

    name: str
    num_words: int
    peer: Callable[[], None]
    ours: Callable[[], None]


def lengths(num_sentences: int, generator: torch.Generator) -> Tensor:
    """Log-normal sentence lengths of the given mean, like news text."""
    normal = torch.randn(num_sentences, generator=generator)
    return torch.exp(math.log(MEAN_LENGTH) - SPREAD**2 / 2 + SPREAD * normal).round().clamp(1, LONGEST).long()


def lstm_row(options: StepOptions, batch_size: int) -> Row:
    """AllenNLP's ElmoLstm against the fused one, on one batch."""
    generator = torch.Generator().manual_seed(batch_size)
    sizes = (options.projection_size, options.projection_size, options.cell_size, options.num_layers)
    clips = {"memory_cell_clip_value": 3.0, "state_projection_clip_value": 3.0}
    peer, ours = reference.elmo_lstm()(*sizes, **clips), FusedElmoLstm(*sizes, **clips)  # type: ignore[arg-type]
    for lstm in (peer, ours):
        initialize_lstm(lstm, "glorot", torch.Generator().manual_seed(1))
    counts = lengths(batch_size, generator)
    mask = torch.arange(int(counts.max()))[None, :] < counts[:, None]
    inputs = torch.randn(*mask.shape, options.projection_size, generator=generator, requires_grad=True)

    def run(lstm: torch.nn.Module) -> None:
        lstm.zero_grad()
        lstm(inputs, mask)[-1].sum().backward()

    def run_peer() -> None:
        peer.reset_states()
        run(peer)

    return Row(f"LSTM, B {batch_size}", int(counts.sum()), run_peer, lambda: run(ours))


def softmax_row(options: StepOptions) -> Row:
    """Plain autograd against the chunked function, both directions of ``num_targets`` words."""
    generator = torch.Generator().manual_seed(2)
    num_rows = options.num_samples + options.num_targets // 4
    shapes = [(options.num_targets, options.projection_size), (num_rows, options.projection_size), (num_rows,)]
    context, weight, bias = (torch.randn(*shape, generator=generator, requires_grad=True) for shape in shapes)
    target = torch.randint(num_rows, (options.num_targets,), generator=generator)
    sample = torch.randperm(num_rows, generator=generator)[: options.num_samples]
    log_expected = -torch.rand(num_rows, generator=generator)

    def plain() -> Tensor:
        offset = bias - log_expected
        true = (context * weight[target]).sum(1) + offset[target]
        logits = torch.addmm(offset[sample], context, weight[sample].t())
        logits = logits.masked_fill(sample == target[:, None], -math.inf)
        return -torch.log_softmax(torch.cat([true[:, None], logits], 1), 1)[:, 0].sum()

    def run(nll: Callable[[], Tensor]) -> None:
        for _ in ("forward", "backward"):
            context.grad = weight.grad = bias.grad = None
            nll().backward()

    def chunked() -> Tensor:
        return sampled_softmax_nll(context, weight, bias, target, sample, log_expected)

    name = f"softmax, N 2 x {options.num_targets}, S {options.num_samples}"
    return Row(name, options.num_targets, lambda: run(plain), lambda: run(chunked))


def measure(row: Row, repeats: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """By ``clock``, median seconds of the peer and of ours, and the median of their ratios, run in turn."""
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        pair = []
        for run in (row.peer, row.ours):
            start = clock()
            run()
            pair.append(clock() - start)
        times.append((pair[0], pair[1]))
    kept = times[1:]
    peer, ours = (statistics.median(pair[index] for pair in kept) for index in (0, 1))
    return peer, ours, statistics.median(a / b for a, b in kept)


def main(argv: list[str]) -> None:
    """Print the table."""
    options = parse(StepOptions, argv, prog="python -m benchmarks.step", description="Time the parts of a step.")
    rows = [*(lstm_row(options, size) for size in options.batch_sizes), softmax_row(options)]
    print(f"D {options.projection_size}, C {options.cell_size}, L {options.num_layers}; forward and backward pass")
    print(f"{'threads':>7}  {'':<30}{'peer words/s':>14}{'ours words/s':>14}{'ratio':>8}")
    for threads in options.threads:
        torch.set_num_threads(threads)
        clock = time.process_time if threads == 1 else time.perf_counter
        for row in rows:
            peer_s, ours_s, ratio = measure(row, options.repeats, clock)
            rates = f"{row.num_words / peer_s:>14,.0f}{row.num_words / ours_s:>14,.0f}"
            print(f"{threads:>7}  {row.name:<30}{rates}{ratio:>8.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
