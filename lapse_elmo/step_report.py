"""The reports that ranks exchange at every step: numbers to add up, and votes on what happens next.

Each rank packs its :class:`RankReport` into one float64 vector; one all-gather per step makes it known to all ranks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from lapse_elmo.mpi.world import World


@dataclass(frozen=True)
class Vote:
    """What one rank asks of all others at a step.

    Ranks must act on these together, so none of them acts on its own clock, signals or disk alone.

    Attributes:
        stop: A signal asked this rank to save and stop.
        end: The time for training (--max-minutes) is over by this rank's clock.
        save: A checkpoint is due by this rank's clock.
        written: This rank has written its files of the checkpoint under way.
        failed: This rank could not write its files.
    """

    stop: bool = False
    end: bool = False
    save: bool = False
    written: bool = False
    failed: bool = False


@dataclass(frozen=True)
class Tally:
    """How many of ``num_ranks`` ranks cast each vote of :class:`Vote`; the same on all ranks."""

    num_ranks: int
    stop: int = 0
    end: int = 0
    save: int = 0
    written: int = 0
    failed: int = 0


@dataclass(frozen=True)
class StepCounts:
    """What a step has trained on, and the loss.

    Attributes:
        nll: Summed over all targets, in nats.
        num_targets: Targets of both directions.
        num_tokens: Words, without boundaries.
        num_cut: Sentences that were cut at --max-length.
        num_sentences: Sentences.
    """

    nll: float
    num_targets: int
    num_tokens: int
    num_cut: int
    num_sentences: int


@dataclass(frozen=True)
class RankReport(StepCounts):
    """What one rank has computed in a step; the counts are those of this rank.

    Attributes:
        row_square: Share in the squared norm of the rows' mean gradient over all parts of all ranks.
        dense_square: Share in the squared norm of the mean dense gradient.
        own_dense_squares: Share in the sum over the ranks of the squared norm of a rank's own dense gradient (the mean
            over its parts).
        compute_s: Seconds of computing.
    """

    row_square: float
    dense_square: float
    own_dense_squares: float
    compute_s: float


_REPORT = [field.name for field in dataclasses.fields(RankReport)]
_VOTE = [field.name for field in dataclasses.fields(Vote)]


class StepReports:
    """The reports and votes of all ranks at a step.

    Attributes:
        ranks: The reports by rank: arrays (ranks,) float64, named as the fields of :class:`RankReport`.
        total: The sums over the ranks, likewise.
        votes: The votes of all ranks.
        finite: Whether all numbers of all ranks are finite.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        """Unpack an array (ranks, report and vote fields) float64."""
        self.ranks = dict(zip(_REPORT, numbers.T, strict=False))
        sums = numbers.sum(0).tolist()
        self.total = dict(zip(_REPORT, sums, strict=False))
        self.votes = Tally(len(numbers), *map(int, sums[len(_REPORT) :]))
        self.finite = bool(np.isfinite(numbers).all())


def exchange_reports(world: World, report: RankReport, vote: Vote) -> StepReports:
    """Return what all ranks report at this step; every rank gets the same (collective)."""
    numbers = [getattr(report, name) for name in _REPORT] + [getattr(vote, name) for name in _VOTE]
    return StepReports(world.gather_numbers(np.array(numbers, np.float64)))


def report_bytes() -> int:
    """Return the bytes that a rank sends to each other rank per step."""
    return 8 * (len(_REPORT) + len(_VOTE))


@dataclass(frozen=True)
class StepResult(StepCounts):
    """The result of a step over all ranks, the same on each of them except for ``seconds``.

    Attributes:
        gradient_norm: Norm of the gradient before clipping.
        learning_rate: The learning rate of rows at this step.
        dense_rate: That of the dense parameters.
        sums_bytes: Bytes that all ranks have sent to other nodes to sum gradients and to average dense parameters, if
            they sum in a ring.
        settled: Whether all nodes have the same dense parameters after the step.
        signal: With ``noise``, the parts of the gradient noise scale (:mod:`lapse_elmo.gradient_noise`), or 0 if the
            step does not show it.
        noise: See ``signal``.
        votes: What the ranks voted for.
        seconds: This rank's seconds by phase: pull, compute, agree (waiting for other ranks), push.
        compute_s: (ranks,) the compute seconds of every rank.
    """

    gradient_norm: float
    learning_rate: float
    dense_rate: float
    sums_bytes: float
    settled: bool
    signal: float
    noise: float
    votes: Tally
    seconds: dict[str, float]
    compute_s: np.ndarray
