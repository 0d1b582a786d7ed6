"""Detect that a run diverges, so that it can be stopped instead of training a useless model.

An untrained model predicts about as well as the word frequencies, whose loss is the unigram loss. A model whose loss
stays far above that has lost what it had learned and does not recover; nor does one whose gradients have exploded.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

MARGIN_NATS = 2.0  # above the unigram's loss: a perplexity 7.4 times as high
EARLY_EXTRA_MARGIN_NATS = 3.0  # in addition, in the first steps: not even an untrained model has such a held-out loss
MAX_BAD_STEPS = 30  # consecutive bad steps after which a run is stopped
NORM_GROWTH = 1e4  # a norm is bad if it is this many times the lowest mean norm so far
_SMOOTHING = 0.1  # the weight of the newest norm in the running mean
_STORED = {"exploding_steps": "wild_steps"}  # names in manifests that differ from those of the fields


@dataclass
class Watch:
    """Follows the loss and the gradient norm of every step; checkpoints store it.

    Attributes:
        bound: Training loss in nats per target above which a step counts as bad; set when the run starts.
        bad_steps: Consecutive bad steps up to now.
        steps: Steps seen.
        norm: Running mean of the gradient norm.
        lowest_norm: Lowest value of ``norm`` after the first ``MAX_BAD_STEPS`` steps.
        exploding_steps: Consecutive steps up to now with ``norm`` above ``NORM_GROWTH`` times ``lowest_norm``.
    """

    bound: float = math.inf
    bad_steps: int = 0
    steps: int = 0
    norm: float = 0.0
    lowest_norm: float = math.inf
    exploding_steps: int = 0

    def plain(self) -> dict[str, float]:
        """Return plain values for the manifest."""
        return {_STORED.get(name, name): value for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def of(cls, plain: dict[str, float]) -> Watch:
        """Return the state from the result of :meth:`plain`."""
        names = {stored: name for name, stored in _STORED.items()}
        return cls(**{names.get(name, name): value for name, value in plain.items()})  # type: ignore[arg-type]

    def add(self, loss: float, norm: float) -> None:
        """Count a step, with its loss in nats per target and its gradient norm before clipping."""
        self.steps += 1
        self.bad_steps = self.bad_steps + 1 if loss > self.bound else 0
        self.norm = norm if self.steps == 1 else self.norm + _SMOOTHING * (norm - self.norm)
        self.exploding_steps = self.exploding_steps + 1 if self.norm > NORM_GROWTH * self.lowest_norm else 0
        if self.steps >= MAX_BAD_STEPS:
            self.lowest_norm = min(self.lowest_norm, self.norm)

    @property
    def suspicious(self) -> bool:
        """Whether the last step was bad: a checkpoint of it should not replace a good one."""
        return self.bad_steps > 0 or self.exploding_steps > 0

    def seen(self) -> str:
        """Return the evidence that the training diverges, or an empty string."""
        if self.bad_steps >= MAX_BAD_STEPS:
            return (
                f"the training loss of the last {self.bad_steps} steps was above {self.bound:.2f} nats, "
                f"{MARGIN_NATS:g} above the unigram's"
            )
        if self.exploding_steps >= MAX_BAD_STEPS:
            return (
                f"the gradient norm has stayed above {NORM_GROWTH:,.0f} times its lowest for {self.exploding_steps} "
                f"steps ({self.norm:.3g}, after {self.lowest_norm:.3g})"
            )
        return ""

    def seen_heldout(self, loss: float) -> str:
        """Return the evidence in a held-out loss (nats per target), or an empty string.

        In the first ``MAX_BAD_STEPS`` steps only a loss far above the bound counts, later any that is above it.
        """
        bound = self.bound if self.steps >= MAX_BAD_STEPS else self.bound + EARLY_EXTRA_MARGIN_NATS
        if loss <= bound:
            return ""
        unigram = math.exp(self.bound - MARGIN_NATS)
        return (
            f"held-out perplexity is {math.exp(min(loss, 700.0)):.3g}, where word frequencies alone give {unigram:.1f}"
        )


def advice(learning_rate: float, dense_rate: float) -> str:
    """Return a suggestion of options to change.

    Args:
        learning_rate: The learning rate of the last step.
        dense_rate: ``--dense-rate``; 0 if it follows ``--learning-rate``.
    """
    dense = f", --dense-rate (given as {dense_rate:g})" if dense_rate else ""
    return (
        f"lower --learning-rate (now {learning_rate:g}){dense} or --loss-scale, or give --warmup-tokens or a smaller "
        "--first-batch"
    )
