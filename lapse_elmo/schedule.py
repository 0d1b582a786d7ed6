"""The learning rate of a step, as a function of the tokens trained: a pure function, so a resumed run repeats it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lapse_elmo.config.training import OptimizerConfig


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then constant, or falling linearly, by half a cosine, or with the inverse square root of the tokens.

    :ivar config: the options; see their help. :ivar run_tokens: tokens of the whole run, over which linear and cosine
        fall where ``--decay-tokens`` does not say otherwise.
    """

    config: OptimizerConfig
    run_tokens: float

    def rate(self, tokens: float, step_tokens: float) -> float:
        """The learning rate of the step that is trained after ``tokens`` tokens.

        :param step_tokens: tokens of this step: the warm-up counts them, so that the first step's rate is not 0.
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
