"""Whether a run diverges: it is stopped then, for what it would save later is worth nothing.

A model without any training predicts about as well as the word frequencies, whose loss is the unigram's. One whose loss
is far above that, for long, has lost what it knew and does not find back; nor does one whose gradients have exploded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MARGIN_NATS = 2.0  # above the unigram's loss: a perplexity 7.4 times as high
ABSURD_NATS = 3.0  # further above, a held-out loss says so after any number of steps: no untrained model has it
PATIENCE_STEPS = 30  # training steps in a row
NORM_GROWTH = 1e4  # times the lowest mean norm so far
_SMOOTHING = 0.1  # of a norm in the running mean


@dataclass
class Watch:
    """Looks at every step; plain values, which a checkpoint holds.

    :ivar bound: training loss in nats above which a step counts as bad; set when the run starts.
    :ivar bad_steps: such steps in a row, up to now. :ivar steps: steps seen. :ivar norm: running mean of the gradient
        norm. :ivar lowest_norm: the lowest that it was after ``PATIENCE_STEPS`` steps. :ivar wild_steps: steps in a row
        with a running mean of ``NORM_GROWTH`` times the lowest.
    """

    bound: float = math.inf
    bad_steps: int = 0
    steps: int = 0
    norm: float = 0.0
    lowest_norm: float = math.inf
    wild_steps: int = 0

    def add(self, loss: float, norm: float) -> None:
        """After a step: its loss in nats per target, and its gradient norm before clipping."""
        self.steps += 1
        self.bad_steps = self.bad_steps + 1 if loss > self.bound else 0
        self.norm = norm if self.steps == 1 else self.norm + _SMOOTHING * (norm - self.norm)
        self.wild_steps = self.wild_steps + 1 if self.norm > NORM_GROWTH * self.lowest_norm else 0
        if self.steps >= PATIENCE_STEPS:
            self.lowest_norm = min(self.lowest_norm, self.norm)

    @property
    def suspicious(self) -> bool:
        """Whether the last step was bad: a checkpoint of it should not push a good one out."""
        return self.bad_steps > 0 or self.wild_steps > 0

    def seen(self) -> str:
        """What shows that the training diverges, or nothing."""
        if self.bad_steps >= PATIENCE_STEPS:
            return (
                f"the training loss of the last {self.bad_steps} steps was above {self.bound:.2f} nats, "
                f"{MARGIN_NATS:g} above the unigram's"
            )
        if self.wild_steps >= PATIENCE_STEPS:
            return (
                f"the gradient norm has stayed above {NORM_GROWTH:,.0f} times its lowest for {self.wild_steps} steps "
                f"({self.norm:.3g}, after {self.lowest_norm:.3g})"
            )
        return ""

    def seen_heldout(self, loss: float) -> str:
        """What a held-out loss in nats shows: a high one once enough steps are trained, an absurd one at once."""
        bound = self.bound if self.steps >= PATIENCE_STEPS else self.bound + ABSURD_NATS
        if loss <= bound:
            return ""
        unigram = math.exp(self.bound - MARGIN_NATS)
        return (
            f"held-out perplexity is {math.exp(min(loss, 700.0)):.3g}, where word frequencies alone give {unigram:.1f}"
        )


def advice(learning_rate: float) -> str:
    """What to change."""
    return (
        f"lower --learning-rate (now {learning_rate:g}) or --loss-scale, or give --warmup-tokens or a smaller "
        "--first-batch"
    )
