"""Measure learning by number of ranks: ``python -m benchmarks.ranks_learning TRAIN HELDOUT --output DIR``.

Makes a vocabulary (threshold 3) and shards of the text files TRAIN and HELDOUT, and trains the ``small`` sizes with the
defaults of ``bin/train`` (or ``--options``) for each number of ranks and each seed, up to the largest of ``--tokens``.
Reports the held-out perplexity at each number of tokens, interpolated in the logarithm of the tokens between the two
nearest evaluations. More than ``--most-ranks`` ranks are simulated by ``--processes`` processes with ``--accumulate``,
which computes the same. ``--check N ...`` verifies that: it trains a few steps with N real ranks and with N simulated
ones, and prints the largest difference of their losses. ``--part-sentences N`` is faster: the sentences of several
simulated ranks form one part, which differs from the ranks of a node only in the dropout masks and in how the size of
a batch is rounded.

DIR gets a directory per run, ``results.json``, ``table.md`` and ``curves.svg``. Completed runs are not repeated, so the
study may be interrupted and resumed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning import steps_until
from lapse_elmo.config.cli import option, parse
from lapse_elmo.config.training import parse_train
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.mpi.host import usable_cores

ROOT = Path(__file__).resolve().parent.parent
EVALUATIONS = 12  # per run, in addition to those at the end of each epoch
CHECK_STEPS = 12


@dataclass(frozen=True)
class Study:
    """The options of the benchmark."""

    train: str = option(metavar="TRAIN", positional=True, help="training text, one sentence per line")
    heldout: str = option(metavar="HELDOUT", positional=True, help="held-out text")
    output: str = option(metavar="DIR", help="directory for runs, table and figure")
    ranks: tuple[int, ...] = option((1, 2, 4, 8, 16, 64, 256), metavar="R", help="numbers of ranks")
    most_ranks: int = option(16, metavar="R", help="largest number of real ranks; more are simulated")
    tokens: tuple[float, ...] = option(
        (3e5, 9e5), metavar="N", help="numbers of trained tokens at which to report the perplexity"
    )
    seeds: tuple[int, ...] = option((1, 2, 3), metavar="N", help="seeds; the table shows the medians")
    processes: int = option(usable_cores(), metavar="P", help="largest number of processes that simulate more ranks")
    part_sentences: int = option(
        0, metavar="N", help="merge simulated ranks into parts of up to N sentences; 0: each rank is a part"
    )
    options: str = option("", metavar="'OPTION ...'", help="options of bin/train for all runs")
    check: tuple[int, ...] = option((), metavar="R", help="only compare R real with R simulated ranks")


def command(study: Study, num_ranks: int, num_processes: int, run_dir: Path, *more: str) -> list[str]:
    """Return the command of a run of ``num_ranks`` ranks, which fewer processes may simulate."""
    folder = Path(study.output)
    parts, batch_size = parts_of(study, num_ranks // num_processes)
    return [
        f"{sys.prefix}/bin/mpirun", "-n", str(num_processes), "bin/train", "--shards", str(folder / "shards"),
        "--vocab", str(folder / "vocab.txt"), "--run-dir", str(run_dir), "--overwrite", "--progress", "none",
        "--threads", "1", "--save-every-minutes", "0", *shlex.split(study.options),
        "--accumulate", str(parts), "--batch-size", str(batch_size), *more,
    ]


def parts_of(study: Study, num_ranks: int) -> tuple[int, int]:
    """Return with how many parts of how many sentences a process does the work of ``num_ranks`` ranks."""
    batch_size = parse_train(shlex.split(study.options)).training.batch_size
    fits = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0 and n * batch_size <= study.part_sentences]
    merged = max(fits, default=1)
    return num_ranks // merged, merged * batch_size


def processes_for(study: Study, num_ranks: int) -> int:
    """Return ``num_ranks`` or, above ``--most-ranks``, the most processes that divide the ranks evenly."""
    if num_ranks <= study.most_ranks:
        return num_ranks
    return max(p for p in range(1, study.processes + 1) if num_ranks % p == 0)


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind of a run's metrics."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def run(study: Study, num_ranks: int, seed: int, shards: ShardSet) -> Path:
    """Train, unless the run is complete; returns its directory.

    Raises:
        SystemExit: If it was a run on another text or with other options.
    """
    run_dir = Path(study.output) / f"ranks-{num_ranks}-seed-{seed}"
    done, recipe = run_dir / "done", f"{study.train} {study.heldout} {study.options} --tokens {max(study.tokens):g}"
    if done.exists() and done.read_text() != recipe:
        raise SystemExit(f"{run_dir} is of another study ({done.read_text()}): give another --output")
    if not done.exists():
        sentences = max(study.tokens) * shards.num_sentences / shards.num_tokens
        processes = processes_for(study, num_ranks)
        parts, batch_size = parts_of(study, num_ranks // processes)
        options = [*shlex.split(study.options), "--batch-size", str(batch_size)]
        steps, epochs = steps_until(sentences, processes * parts, options, shards)
        every = str(max(steps // EVALUATIONS, 1))
        more = ("--seed", str(seed), "--epochs", str(epochs), "--max-steps", str(steps), "--evaluate-every", every)
        subprocess.run(
            command(study, num_ranks, processes, run_dir, *more), cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        )
        done.write_text(recipe)
    return run_dir


def curve(run_dir: Path) -> list[tuple[float, float]]:
    """Return (tokens, held-out perplexity) of each evaluation."""
    return [(e["train/trained_tokens"], e["heldout/mean_perplexity"]) for e in records(run_dir, "epoch")]


def perplexity_at(points: Sequence[tuple[float, float]], tokens: float) -> float:
    """Interpolate the perplexity at a number of tokens; NaN outside the evaluations."""
    for (before, first), (after, second) in itertools.pairwise(points):
        if before <= tokens <= 1.001 * after and after > before:
            share = min(math.log(tokens / before) / math.log(after / before), 1.0)
            return math.exp((1 - share) * math.log(first) + share * math.log(second))
    return next((value for count, value in points if abs(count - tokens) < 1e-3 * tokens), math.nan)


def write_results(study: Study, curves: dict[int, list[list[tuple[float, float]]]]) -> None:
    """Write the results, the table of medians and the figure."""
    folder = Path(study.output)
    (folder / "results.json").write_text(json.dumps(curves, indent=1))
    head = "| ranks |" + "".join(f" {tokens / 1e6:g} M tokens | to the first |" for tokens in study.tokens)
    lines = [head, "|---" * (1 + 2 * len(study.tokens)) + "|"]
    first: list[float] = []
    for num_ranks, seeds in curves.items():
        values = [statistics.median(perplexity_at(points, tokens) for points in seeds) for tokens in study.tokens]
        first = first or values
        cells = "".join(f" {value:.1f} | {value / base - 1:+.1%} |" for value, base in zip(values, first, strict=True))
        lines.append(f"| {num_ranks} |{cells}")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    draw(folder / "curves.svg", curves)


def draw(path: Path, curves: dict[int, list[list[tuple[float, float]]]]) -> None:
    """Plot perplexity by tokens, with one colour per number of ranks and one line per seed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure((9, 6), layout="constrained")
    axis = figure.subplots()
    for place, (num_ranks, seeds) in enumerate(curves.items()):
        for number, points in enumerate(seeds):
            axis.plot(
                [tokens / 1e6 for tokens, _ in points], [value for _, value in points], ".-",
                color=colormaps["viridis"](place / max(len(curves) - 1, 1)), alpha=0.8,
                label=f"{num_ranks} rank{'s' * (num_ranks > 1)}" if number == 0 else None,
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    for scale, marks in ((axis.xaxis, (1, 2, 5)), (axis.yaxis, range(1, 10))):
        scale.set_major_locator(LogLocator(subs=marks))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter(NullFormatter())
    axis.set_xlabel("million tokens")
    axis.set_ylabel("held-out perplexity")
    axis.legend()
    figure.savefig(path, metadata={"Date": None})


def check(study: Study, num_ranks: int) -> None:
    """Print the largest difference between the losses of real ranks and of as many simulated ranks."""
    folder = Path(study.output)
    losses = []
    for processes in (num_ranks, max(p for p in range(1, study.processes + 1) if num_ranks % p == 0)):
        run_dir = folder / f"check-{num_ranks}-by-{processes}"
        more = ("--sync", "--report-every", "1", "--max-steps", str(CHECK_STEPS))
        subprocess.run(
            command(study, num_ranks, processes, run_dir, *more), cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        losses.append([line["train/loss_nats"] for line in records(run_dir, "train")])
    apart = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    print(f"{num_ranks} ranks, real and simulated, {CHECK_STEPS} steps: losses differ by at most {apart:.1e}")


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog="benchmarks.ranks_learning", description="Measure learning by number of ranks.")
    folder = Path(study.output).resolve()
    study = dataclasses.replace(study, output=str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "shards").exists():
        texts = [str(Path(text).resolve()) for text in (study.train, study.heldout)]
        vocab, shards_dir = str((folder / "vocab.txt").resolve()), str((folder / "shards").resolve())
        make = ("bin/preprocess", "shards", texts[0], "--heldout", texts[1], "--vocab", vocab, "--output", shards_dir)
        subprocess.run(("bin/preprocess", "vocab", texts[0], "--output", vocab), cwd=ROOT, check=True)
        subprocess.run(make, cwd=ROOT, check=True)
    for num_ranks in study.check:
        check(study, num_ranks)
    if study.check:
        return
    curves: dict[int, list[list[tuple[float, float]]]] = {}
    with ShardSet.open(folder / "shards", "train") as shards:
        for num_ranks in study.ranks:
            curves[num_ranks] = [curve(run(study, num_ranks, seed, shards)) for seed in study.seeds]
            write_results(study, curves)


if __name__ == "__main__":
    main(sys.argv[1:])
