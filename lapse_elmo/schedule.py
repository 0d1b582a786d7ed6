"""The learning rate as a pure function of the tokens trained, so that a resumed run repeats it exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lapse_elmo.config.training import OptimizerConfig


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then a constant rate, or one that decays linearly, by half a cosine or by the inverse square root.

    Attributes:
        config: The options; see their help texts.
        run_tokens: Tokens of the whole run, over which linear and cosine decay unless ``--decay-tokens`` is given.
    """

    config: OptimizerConfig
    run_tokens: float

    def rate(self, tokens: float, step_tokens: float) -> float:
        """Return the learning rate of the next step.

        Args:
            tokens: Tokens trained before it.
            step_tokens: Tokens of the step itself. Warm-up counts them, so that the rate of the first step is not 0.
        """
        config = self.config
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
