"""What a run has done so far: sums since the last report and of the epoch, evaluations, and the table at its end."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lapse_elmo import checkpoint
from lapse_elmo.divergence import Watch
from lapse_elmo.errors import CheckpointError, in_one_line
from lapse_elmo.evaluate import Perplexity
from lapse_elmo.metrics.run_log import Meter, table
from lapse_elmo.step import StepResult

_SHOWN = 20  # rows of the final table


@dataclass(frozen=True)
class EpochResult:
    """One row of the final table."""

    step: int
    epoch: float  # epochs done so far; a fraction within one
    num_tokens: int
    tokens_per_s: float
    training_loss: float
    heldout: Perplexity


@dataclass
class RunState:
    """What a run knows in addition to its parameters and its place in the corpus; a checkpoint holds it.

    :ivar meter: since the last report. :ivar whole: since the start of the epoch.
    :ivar evaluation_due: whether a signal kept an evaluation from happening.
    :ivar trained_s: seconds of training before this process. :ivar served: the server meter's counts.
    :ivar watch: looks out for divergence.
    """

    meter: Meter = field(default_factory=Meter)
    whole: Meter = field(default_factory=Meter)
    results: list[EpochResult] = field(default_factory=list)
    evaluation_due: bool = False
    trained_s: float = 0.0
    served: list[float] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    start: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Seconds of training in all."""
        return self.trained_s + time.monotonic() - self.start

    def add(self, result: StepResult) -> None:
        self.meter.add(result)
        self.whole.add(result)
        self.watch.add(result.nll / max(result.num_targets, 1), result.gradient_norm)

    def out_of_patience(self, patience: int) -> bool:
        """Whether ``patience`` evaluations in a row, the last ones, were no better than one before."""
        measured = [result.heldout.mean for result in self.results]
        return 0 < patience < len(measured) and min(measured[-patience:]) >= min(measured[:-patience])

    def plain(self) -> dict[str, Any]:
        return {
            "meter": self.meter.state(), "whole": self.whole.state(),
            "results": [dataclasses.asdict(result) for result in self.results],
            "evaluation_due": self.evaluation_due, "trained_s": self.elapsed_s, "served": self.served,
            "watch": dataclasses.asdict(self.watch),
        }

    @classmethod
    def of(cls, plain: dict[str, Any]) -> RunState:
        """The state whose :meth:`plain` this is. :raises CheckpointError: if it is not."""
        try:
            return cls._of(plain)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the state of the run in the checkpoint is damaged: {in_one_line(error)}") from None

    @classmethod
    def _of(cls, plain: dict[str, Any]) -> RunState:
        results = [EpochResult(**{**row, "heldout": Perplexity(**row["heldout"])}) for row in plain["results"]]
        return cls(
            Meter.of(plain["meter"]), Meter.of(plain["whole"]), results, plain["evaluation_due"], plain["trained_s"],
            plain["served"], Watch(**plain.get("watch", {})),
        )


def summary(results: list[EpochResult], unigram: float, run_dir: Path) -> str:
    """The final table, of the last evaluations."""
    head = ("epochs", "tokens", "tokens/s", "training loss", "held-out forward", "backward", "mean", "unigram")
    rows = [
        (
            *(f"{r.epoch:.2f}".removesuffix(".00"), f"{r.num_tokens:,}"),
            *(f"{r.tokens_per_s:,.0f}", f"{r.training_loss:.3f}"),
            *(f"{value:.1f}" for value in (r.heldout.forward, r.heldout.backward, r.heldout.mean, unigram)),
        )
        for r in results[-_SHOWN:]
    ]
    best = min(results, key=lambda result: result.heldout.mean) if results else None
    lines = [table([head, *rows]), "", f"Perplexity is exp(loss) a target; the run is in {run_dir}."]
    if best is not None:
        path = run_dir / checkpoint.BEST
        lines += [
            f"The best model, of step {best.step:,}, is {path}: perplexity {best.heldout.mean:.1f}.",
            f"To evaluate it: bin/evaluate {path} [--shards DIR]",
            f"To export it:   bin/export {path} --output DIR    (for AllenNLP, bilm-tf)",
            f"To embed text:  bin/embed {path} TEXT... --output FILE.hdf5",
        ]
    return "\n".join(["", *lines])
