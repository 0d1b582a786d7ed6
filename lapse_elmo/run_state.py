"""What a run has done so far: sums since the last report and of the epoch, and its evaluations."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

from lapse_elmo.divergence import Watch
from lapse_elmo.errors import CheckpointError, in_one_line
from lapse_elmo.metrics.run_log import Meter
from lapse_elmo.perplexity import Perplexity
from lapse_elmo.step_report import StepResult


@dataclass(frozen=True)
class EpochResult:
    """The result of one evaluation, a row of the final table."""

    step: int
    epoch: float  # epochs done so far, with a fraction within an epoch
    num_tokens: int
    tokens_per_s: float
    training_loss: float
    heldout: Perplexity


@dataclass
class RunState:
    """Mutable state of a run other than parameters and cursor; stored in checkpoints.

    Attributes:
        meter: Sums since the last report.
        epoch_meter: Sums since the start of the epoch.
        results: All evaluations so far.
        evaluation_due: Whether an evaluation was skipped because a signal stopped the run.
        trained_s: Seconds of training before this process.
        served: The server meter's counts since the last report.
        watch: Detects divergence.
        start: When this process began, by the monotonic clock.
    """

    meter: Meter = field(default_factory=Meter)
    epoch_meter: Meter = field(default_factory=Meter)
    results: list[EpochResult] = field(default_factory=list)
    evaluation_due: bool = False
    trained_s: float = 0.0
    served: list[float] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    start: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, in all processes of the run."""
        return self.trained_s + time.monotonic() - self.start

    def add(self, result: StepResult) -> None:
        """Count a step."""
        self.meter.add(result)
        self.epoch_meter.add(result)
        if result.num_targets:  # a step in which no rank has a sentence says nothing, and its norm is 0
            self.watch.add(result.nll / result.num_targets, result.gradient_norm)

    def out_of_patience(self, patience: int) -> bool:
        """Return whether none of the last ``patience`` evaluations was better than the best one before; 0: never."""
        measured = [result.heldout.mean for result in self.results]
        return 0 < patience < len(measured) and min(measured[-patience:]) >= min(measured[:-patience])

    def plain(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        return {
            "meter": self.meter.state(), "whole": self.epoch_meter.state(),
            "results": [dataclasses.asdict(result) for result in self.results],
            "evaluation_due": self.evaluation_due, "trained_s": self.elapsed_s, "served": self.served,
            "watch": self.watch.plain(),
        }

    @classmethod
    def of(cls, plain: dict[str, Any]) -> RunState:
        """Return the state from the result of :meth:`plain`.

        Raises:
            CheckpointError: If it is damaged.
        """
        try:
            results = [EpochResult(**{**row, "heldout": Perplexity(**row["heldout"])}) for row in plain["results"]]
            return cls(
                Meter.of(plain["meter"]), Meter.of(plain["whole"]), results, plain["evaluation_due"],
                plain["trained_s"], plain["served"], Watch.of(plain.get("watch", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the state of the run in the checkpoint is damaged: {in_one_line(error)}") from None
