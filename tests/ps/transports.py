"""The parameter server on every transport that this machine has: ``python -m tests.ps.transports [WORD...]``.

Prints one line per case with its time and verdict, and the output of failed cases. Only cases whose names contain all
WORDs are run; an absent transport is one line. It takes some ten minutes on idle cores; ``--patience`` multiplies all
time limits.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests import collective, hosts, mpi, open_mpi
from tests.ps import contract_program, failing_program, liveness_program
from tests.training.corpora import TINY, Prepared, prepare, random_sentences, records

GLOBAL_BATCH, EPOCHS, WORST_PERPLEXITY = 32, 2, 30  # far below the 43 of a uniform guess
FAILURES = [("kill", -1), ("exception", 1), ("manager", 0)]  # kind, and the rank that fails
CONTRACT_S, LIVENESS_S, TRAINING_S = 240, 120, 150


@dataclass(frozen=True)
class Transport:
    """A transport. ``job``: arguments of :func:`tests.mpi.mpirun`; ``nodes``: nodes per machine."""

    name: str
    ranks: int
    nodes: int
    job: dict[str, Any] = field(default_factory=dict)
    engines: tuple[str, ...] = ("adaptive",)
    why_not: Callable[[], str] = str
    context: Callable[[], contextlib.AbstractContextManager[dict[str, Any]]] | None = None


@contextlib.contextmanager
def _over_tcp() -> Iterator[dict[str, Any]]:
    with hosts.two_hosts(2) as two:
        yield {"launcher": two.launcher, "env": hosts.ENVIRONMENT}


TRANSPORTS = [
    Transport("MPICH without CMA", 4, 2, {"env": mpi.CMA_OFF}, ("adaptive", "relocation")),
    Transport("Open MPI", 4, 2, open_mpi.job(), why_not=open_mpi.why_not),
    Transport("Open MPI without CMA", 4, 2, open_mpi.job(open_mpi.CMA_OFF), why_not=open_mpi.why_not),
    Transport("TCP between two hosts", 4, 1, why_not=hosts.why_not, context=_over_tcp),
    *[Transport(f"16 ranks as {nodes} nodes", 16, nodes) for nodes in (2, 4, 8, 16)],
]


class Cases:
    """The cases to run on a transport. A case that fails raises an AssertionError or a TimeoutError."""

    def __init__(self, transport: Transport, job: dict[str, Any], corpus: Prepared, patience: float) -> None:
        self._at, self._job, self._corpus, self._patience = transport, job, corpus, patience
        self._scale = patience * transport.ranks / 4

    def all(self) -> dict[str, Callable[[Path], None]]:
        cases: dict[str, Callable[[Path], None]] = {}
        for engine in self._at.engines:
            cases[f"contract of {engine}"] = partial(self._contract, engine)
        if self._at.ranks == liveness_program.RANKS:
            cases["liveness"] = self._liveness
        for kind, rank in FAILURES:
            rank %= self._at.ranks
            cases[f"failure: {kind} on rank {rank}"] = partial(self._failure, kind, rank)
        cases["training"] = self._training
        return cases

    def _contract(self, engine: str, folder: Path) -> None:
        words = [engine, str(self._at.nodes)]
        self._checks(contract_program.__file__, words, contract_program.names(engine), CONTRACT_S, folder)

    def _liveness(self, folder: Path) -> None:
        words = [str(self._at.nodes)]
        self._checks(liveness_program.__file__, words, liveness_program.NAMES, LIVENESS_S, folder)

    def _checks(self, program: str, words: list[str], names: list[str], limit_s: float, folder: Path) -> None:
        limit_s *= self._scale
        report = collective.report_of(Path(program), words, self._at.ranks, folder, timeout=limit_s, **self._job)
        wrong = {name: report[name] for name in names if report.get(name)}
        for name, problem in wrong.items():
            raise AssertionError(f"{name}: {problem}")
        missing = [name for name in names if name not in report]
        assert not missing, f"not reached: {missing}; the job: {report['']}"

    def _failure(self, kind: str, rank: int, folder: Path) -> None:
        failing_program.run_and_check(kind, rank, self._at.nodes, folder, ranks=self._at.ranks, **self._job)

    def _training(self, folder: Path) -> None:
        ranks, nodes = self._at.ranks, self._at.nodes
        options = ["--epochs", str(EPOCHS), "--batch-size", str(GLOBAL_BATCH // ranks), "--run-dir", str(folder)]
        words = ["bin/train", *self._corpus.options, *TINY, *options, *(["--nodes", str(nodes)] if nodes > 1 else [])]
        ended = mpi.mpirun(ranks, words, timeout=TRAINING_S * self._scale, **self._job)
        assert ended.returncode == 0 and not ended.survivors, ended.output
        num_tokens = sum(len(sentence.split()) for sentence in self._corpus.train)
        epochs = records(folder, "epoch")
        assert [line["train/epoch_tokens"] for line in epochs] == [num_tokens] * EPOCHS
        perplexity = epochs[-1]["heldout/mean_perplexity"]
        assert math.isfinite(perplexity) and perplexity < WORST_PERPLEXITY, f"a perplexity of {perplexity}"


def run(words: list[str], patience: float) -> int:
    """Run the cases whose names contain all ``words``; return the number of failures."""
    num_wrong = num_run = 0
    with tempfile.TemporaryDirectory(prefix="transports-") as root:
        sentences = random_sentences(1, 203, 40, (1, 12)), random_sentences(2, 41, 40, (1, 12))
        with contextlib.redirect_stdout(io.StringIO()):
            corpus = prepare(Path(root, "corpus"), *sentences)
        for number, transport in enumerate(TRANSPORTS):
            names = Cases(transport, {}, corpus, patience).all()
            chosen = [name for name in names if all(word in f"{transport.name}: {name}" for word in words)]
            if not chosen:
                continue
            if transport.why_not():
                print(f"{'skipped':>8}        -  {transport.name}: {transport.why_not()}", flush=True)
                continue
            with transport.context() if transport.context else contextlib.nullcontext(transport.job) as job:
                cases = Cases(transport, job, corpus, patience).all()
                for name in chosen:
                    folder = Path(root, str(number), str(num_run))
                    folder.mkdir(parents=True)
                    num_run += 1
                    num_wrong += not _ends_well(f"{transport.name}: {name}", partial(cases[name], folder))
    assert num_run or not words, f"no case has all of {words} in its name"
    print(f"{num_run - num_wrong} of {num_run} passed", flush=True)
    return num_wrong


def _ends_well(name: str, case: Callable[[], None]) -> bool:
    """Run a case, print how it ended, and return whether it passed."""
    start, problem = time.monotonic(), ""
    try:
        case()
    except (AssertionError, TimeoutError, OSError) as error:
        problem = str(error) or repr(error)
    print(f"{'FAILED' if problem else 'passed':>8} {time.monotonic() - start:6.1f} s  {name}", flush=True)
    if problem:
        print("".join(f"           {line}\n" for line in problem.splitlines()), end="", flush=True)
    return not problem


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ps.transports", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--patience", type=float, default=1.0, help="times all time limits, for a busy machine")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contexts end: nothing remains
    return 1 if run(options.words, options.patience) else 0


if __name__ == "__main__":
    sys.exit(main())
