"""The learning rates as pure functions of the tokens trained, so that a resumed run repeats them exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from lapse_elmo.config.training import Config


class Rates(NamedTuple):
    """The learning rates of a step: of the tables' rows, and of the dense parameters."""

    rows: float
    dense: float


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then a constant rate, or one that decays linearly, by half a cosine or by the inverse square root.

    Attributes:
        config: The options; see their help texts.
        run_tokens: Tokens of the whole run, over which linear and cosine decay unless ``--decay-tokens`` is given.
    """

    config: Config
    run_tokens: float

    def rates(self, tokens: float, step_tokens: float, batch_fraction: float) -> Rates:
        """Return the learning rates of the next step.

        Adam's noise grows with its rate and falls with the square root of the batch (Malladi et al. 2022,
        arXiv:2205.10287). So where few ranks cannot train the batch that the gradient noise allows, Adam's rate is
        scaled by the square root of the fraction that they train, and they learn as many ranks do with larger batches
        (benchmarks/learning.md). Adagrad's steps shrink by themselves.

        Args:
            tokens: Tokens trained before it.
            step_tokens: Tokens of the step itself.
            batch_fraction: The fraction, at most 1, of the batch that the gradient noise allows.
        """
        rate = self.rate(tokens, step_tokens)
        dense = self.config.dense_rate * (rate / self.config.optimizer.learning_rate)
        return Rates(rate, dense * math.sqrt(batch_fraction) if self.config.dense_optimizer == "adam" else dense)

    def rate(self, tokens: float, step_tokens: float) -> float:
        """Return the learning rate of rows at the next step.

        Args:
            tokens: Tokens trained before it.
            step_tokens: Tokens of the step itself. Warm-up counts them, so that the rate of the first step is not 0.
        """
        config = self.config.optimizer
        warm, rate = config.warmup_tokens, config.learning_rate
        if tokens < warm:
            return rate * min((tokens + step_tokens) / warm, 1.0)
        if config.schedule == "constant":
            return rate
        after = tokens - warm
        if config.schedule == "inverse-sqrt":
            return rate * max(1.0 / math.sqrt(1.0 + after / (config.decay_tokens or warm)), config.final_rate)
        done = min(after / (config.decay_tokens or max(self.run_tokens - warm, 1.0)), 1.0)
        left = 1.0 - done if config.schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2
        return rate * (config.final_rate + (1.0 - config.final_rate) * left)
