"""Measure the arithmetic of a training step: ``python -m benchmarks.step``.

Measures the forward and the backward pass with all gradients, and the LSTM's forward pass alone, which is that of
embedding and evaluation. Each row of the table compares three variants, which take
turns so that other load on the machine affects all alike: our code; only its matrix products, computed by torch, which
is an upper limit unless prepacked.c computes them (for few rows); and a peer, AllenNLP's ElmoLstm or a sampled softmax
by plain autograd. Rates are medians; fractions and ratios are medians over turns. Times are CPU time for one thread,
and wall time, which other programs disturb, for more.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lapse_elmo.config.cli import option, parse
from lapse_elmo.config.training import PRESETS, ModelConfig
from lapse_elmo.devices import speed_up_float32
from lapse_elmo.fallbacks import model_fallbacks
from lapse_elmo.model import reference
from lapse_elmo.model.initial_values import initialize_lstm
from lapse_elmo.model.lstm import FusedElmoLstm
from lapse_elmo.model.packing import Packing
from lapse_elmo.model.products import PRECISIONS, Matmul, cpu_multiplies_bf16
from lapse_elmo.model.softmax import sampled_softmax_nll
from lapse_elmo.model.two_threads import run_two_threads
from lapse_elmo.mpi.host import usable_cores

MEAN_LENGTH, SPREAD, MAX_LENGTH = 25.0, 0.3, 250  # words; as in a batch of sentences of similar length (batches.py)


@dataclass(frozen=True)
class StepOptions:
    """Sizes and repeats of the benchmark."""

    sizes: tuple[str, ...] = option(("small", "original"), help="small, original")
    batch_sizes: tuple[int, ...] = option((32, 128), help="sentences per batch with the small sizes")
    original_batch: int = option(32, help="sentences per batch, of 12 words each, with the original sizes")
    num_targets: int = option(1600, help="targets of the softmax, of both directions together")
    num_samples: int = option(8192, help="negative samples, S")
    precisions: tuple[str, ...] = option(PRECISIONS[: 1 + cpu_multiplies_bf16()], help="fp32, bf16")
    threads: tuple[int, ...] = option((1, 2)[: usable_cores()], help="numbers of torch threads; 2 need idle cores")
    repeats: int = option(3, help="runs of each variant, after one that is discarded")
    peers: bool = option(True, help="measure the peers as well")


@dataclass(frozen=True)
class Row:
    """A row of the table: variants of the same work on ``num_words`` words, of ``flops`` operations."""

    name: str
    num_words: int
    flops: float
    ours: Callable[[], None]
    products: Callable[[], None]
    peer: Callable[[], None] | None


def lengths(num_sentences: int, generator: torch.Generator) -> Tensor:
    """Draw log-normal sentence lengths, as in one batch of news text."""
    normal = torch.randn(num_sentences, generator=generator)
    return torch.exp(math.log(MEAN_LENGTH) - SPREAD**2 / 2 + SPREAD * normal).round().clamp(1, MAX_LENGTH).long()


def lstm_row(size: str, counts: Tensor, precision: str, peers: bool, backward: bool = True) -> Row:
    """Prepare the LSTM, all layers and directions, on one batch of sentences of ``counts`` words.

    Args:
        size: The sizes.
        counts: (B,) words of each sentence.
        precision: Of the products.
        peers: Whether to measure the peer too.
        backward: Whether to measure the backward pass too; without it, the modules are in evaluation mode.
    """
    preset = PRESETS[size]
    width, cells, layers = preset["projection_size"], preset["cell_size"], preset["num_layers"]
    clips = {"memory_cell_clip_value": 3.0, "state_projection_clip_value": 3.0}
    lstm = FusedElmoLstm(width, width, cells, layers, precision=precision, **clips)  # type: ignore[arg-type]
    initialize_lstm(lstm, "glorot", torch.Generator().manual_seed(1))
    mask = torch.arange(int(counts.max()))[None, :] < counts[:, None]
    inputs = torch.randn(*mask.shape, width, generator=torch.Generator().manual_seed(2))
    packing = Packing.of_mask(mask)
    rows = packing.pack(inputs).requires_grad_()

    def ours() -> None:
        lstm.zero_grad()
        outputs = lstm.run(rows, packing)[-1]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    @torch.no_grad()
    def ours_forward() -> None:
        lstm.run(rows, packing)

    peer = None
    if peers:
        theirs = reference.elmo_lstm()(width, width, cells, layers, **clips)
        initialize_lstm(theirs, "glorot", torch.Generator().manual_seed(1))
        leaf = inputs.requires_grad_()

        def peer() -> None:
            theirs.reset_states()
            theirs.zero_grad()
            with torch.set_grad_enabled(backward):
                output = theirs(leaf, mask)[-1]
            if backward:
                output.sum().backward()

    words = int(counts.sum())
    products_only = lstm_products(packing.sizes, width, cells, layers, storage_of(precision), backward)
    name = f"LSTM{'' if backward else ' forward'}, {size}, B {len(counts)}, {precision}"
    flops = lstm_flops(width, cells, layers) * words
    if backward:
        return Row(name, words, flops, ours, products_only, peer)
    lstm.eval()
    lstm.eval_precision = precision
    return Row(name, words, flops / 3, ours_forward, products_only, peer)


def lstm_flops(width: int, cells: int, layers: int) -> float:
    """Return the floating-point operations of the LSTM's matrix products per word in training, both directions."""
    return 54.0 * 2 * layers * cells * width


def softmax_flops(width: int, num_samples: int) -> float:
    """Return the operations of the sampled softmax per target in training."""
    return 6.0 * num_samples * width


def storage_of(precision: str) -> torch.dtype:
    """Return the data type of the products' operands; float32 if the CPU only emulates bfloat16."""
    return Matmul.of(precision, torch.empty(0)).cast_weight(torch.empty(0)).dtype


def lstm_products(
    sizes: list[int], width: int, cells: int, layers: int, storage: torch.dtype, backward: bool = True
) -> Callable[[], None]:
    """Prepare the matrix products of :mod:`lapse_elmo.model.lstm_pass`, on as many threads."""
    num_words, most = sum(sizes), max(sizes)
    parts = []
    for _ in range(2):  # small values, so that sums do not grow from run to run
        shapes = ((4 * cells, width), (4 * cells, width), (width, cells), (num_words, width), (num_words, 4 * cells))
        parts.append([(1e-3 * torch.randn(*shape)).to(storage) for shape in shapes])

    def direction(number: int) -> None:
        input_weight, state_weight, projection, rows, gates = parts[number]
        hidden, exposed = (rows.new_zeros(most, size) for size in (width, cells))
        all_exposed = rows.new_zeros(num_words, cells)
        for _ in range(layers):
            torch.mm(rows, input_weight.t(), out=gates)
            for part, size in zip(gates.split(sizes), sizes, strict=True):
                part.addmm_(hidden[:size], state_weight.t())
                torch.mm(exposed[:size], projection.t(), out=hidden[:size])
            if not backward:
                continue
            for part, size in zip(gates.split(sizes), sizes, strict=True):
                torch.mm(hidden[:size], projection, out=exposed[:size])
                torch.mm(part, state_weight, out=hidden[:size])
            torch.mm(gates.t(), rows)
            torch.mm(gates[most:].t(), rows[most:])
            torch.mm(rows.t(), all_exposed)
            torch.mm(gates, input_weight)

    return lambda: run_halves(direction)


def run_halves(function: Callable[[int], None]) -> None:
    """Run both halves in two threads, as a training step does."""
    run_two_threads(function, torch.device("cpu"), "")


def softmax_row(size: str, options: StepOptions, precision: str) -> Row:
    """Prepare the sampled softmax: the targets of both directions with shared samples."""
    width, num_targets, num_samples = PRESETS[size]["projection_size"], options.num_targets, options.num_samples
    generator = torch.Generator().manual_seed(2)
    num_rows = num_samples + num_targets // 4
    shapes = [(num_targets, width), (num_rows, width + 1)]
    context, softmax = (torch.randn(*shape, generator=generator, requires_grad=True) for shape in shapes)
    target = torch.randint(num_rows, (num_targets,), generator=generator)
    sample = torch.randperm(num_rows, generator=generator)[:num_samples]
    log_expected = -torch.rand(num_rows, generator=generator)

    def plain() -> Tensor:
        weight, bias = softmax[:, :-1], softmax[:, -1]
        bias_minus_log_q = bias - log_expected
        true = (context * weight[target]).sum(1) + bias_minus_log_q[target]
        logits = torch.addmm(bias_minus_log_q[sample], context, weight[sample].t())
        logits = logits.masked_fill(sample == target[:, None], -math.inf)
        return -torch.log_softmax(torch.cat([true[:, None], logits], 1), 1)[:, 0].sum()

    def run(nll: Callable[[], Tensor]) -> None:
        context.grad = softmax.grad = None
        nll().backward()

    def ours() -> Tensor:
        return sampled_softmax_nll(context, softmax, target, sample, log_expected, precision=precision)

    def products() -> None:
        logits, sums = samples.new_empty(256, num_samples), samples.new_zeros(num_samples, width)
        for some in vectors.chunk(-(-len(vectors) // 256)):
            exp_logits = torch.mm(some, samples.t(), out=logits[: len(some)])
            torch.mm(exp_logits, samples)
            sums.addmm_(exp_logits.t(), some)

    samples, vectors = (values.detach().to(storage_of(precision)) for values in (softmax[:num_samples, :-1], context))
    return Row(
        f"softmax, {size}, S {num_samples}, {precision}", num_targets // 2,
        softmax_flops(width, num_samples) * num_targets,
        lambda: run(ours), products,
        (lambda: run(plain)) if options.peers else None,
    )


def measure(row: Row, repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Measure the seconds of each variant in turn; the first turn is discarded."""
    variants = {"ours": row.ours, "products": row.products, "peer": row.peer}
    times: dict[str, list[float]] = {name: [] for name, run in variants.items() if run}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            if run:
                start = clock()
                run()
                if turn:
                    times[name].append(clock() - start)
    return times


def line(row: Row, times: dict[str, list[float]]) -> str:
    """Format a line: words/s, GFLOP/s, fraction of the products' rate, the peer's words/s, and our speed-up over it."""
    ours = statistics.median(times["ours"])
    share = statistics.median(p / o for p, o in zip(times["products"], times["ours"], strict=True))
    text = f"{row.name:<34}{row.num_words / ours:>10,.0f}{row.flops / ours / 1e9:>9.1f}{share:>8.0%}"
    if "peer" in times:
        ratio = statistics.median(p / o for p, o in zip(times["peer"], times["ours"], strict=True))
        text += f"{row.num_words / statistics.median(times['peer']):>10,.0f}{ratio:>7.2f}"
    return text


def peak_bytes(run: Callable[[], None]) -> int:
    """Measure by how many bytes ``run`` raises the peak resident memory."""
    run()
    ctypes.CDLL(None).malloc_trim(0)  # returns free memory to the system, which else counts as used before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for text in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if text.startswith(f"{name}:"):
            return int(text.split()[1]) * 1024
    raise LookupError(name)


def memory(options: StepOptions) -> str:
    """Measure the peak memory of a whole step with the small sizes and a batch of 128."""
    counts = lengths(128, torch.Generator().manual_seed(128))
    lstm = lstm_row("small", counts, "fp32", peers=False)
    softmax = softmax_row("small", StepOptions(num_targets=2 * lstm.num_words, peers=False), "fp32")

    def run() -> None:
        lstm.ours()
        softmax.ours()

    above = peak_bytes(run) / 1e6
    return f"peak memory of a step, small, B 128, {lstm.num_words} words: {above:.0f} MB above the parameters"


def rows(options: StepOptions) -> list[Row]:
    """Prepare the rows of the table."""
    found = []
    for precision in options.precisions:
        for size in options.sizes:
            if size == "small":
                batches = [lengths(number, torch.Generator().manual_seed(number)) for number in options.batch_sizes]
            else:
                batches = [torch.full((options.original_batch,), 12)]
            found += [lstm_row(size, counts, precision, options.peers) for counts in batches]
            found.append(lstm_row(size, batches[0], precision, options.peers, backward=False))
            found.append(softmax_row(size, options, precision))
    return found


def main(argv: list[str]) -> None:
    """Print the table."""
    options = parse(StepOptions, argv, prog="python -m benchmarks.step", description="Time the parts of a step.")
    speed_up_float32()
    for warning in model_fallbacks(ModelConfig(precision=options.precisions[-1]), torch.device("cpu")):
        print(warning)
    head = f"{'threads':>7}  {'forward and backward pass':<34}{'words/s':>10}{'GFLOP/s':>9}{'share':>8}"
    print(head + f"{'peer':>10}{'ratio':>7}" * options.peers)
    for threads in options.threads:
        torch.set_num_threads(threads)
        clock = time.process_time if threads == 1 else time.perf_counter
        for row in rows(options):
            print(f"{threads:>7}  {line(row, measure(row, options.repeats, clock))}", flush=True)
    print(memory(options))


if __name__ == "__main__":
    main(sys.argv[1:])
