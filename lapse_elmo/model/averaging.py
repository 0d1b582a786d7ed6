"""The mean of the dense parameters over the last steps, which is the model that a run evaluates and saves.

Steps at a constant rate keep moving around a good point, by the noise of the batches; the mean of the points visited is
closer to it than the last one (Polyak and Juditsky 1992, doi:10.1137/0330046; for LSTM language models Merity et al.
2018, arXiv:1708.02182). A learning rate that decays has the same effect, but learns less on its way
(benchmarks/learning.md). Training itself does not read the means.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INTERVAL = 8  # steps between two updates: neighbouring steps hardly differ, and each update reads all parameters


class Averages:
    """Exponential means of parameters over about the last ``fraction`` of the steps.

    A window that grows with the run needs no tuning to its length. Until it exceeds the interval of the updates, the
    means are the parameters.

    Args:
        parameters: The parameters, held by reference.
        means: As many tensors of the same shapes, held by reference.
        fraction: Fraction of the steps, above 0.
    """

    def __init__(self, parameters: Sequence[Tensor], means: Sequence[Tensor], fraction: float) -> None:
        self.means = list(means)
        self._parameters, self._fraction = list(parameters), fraction

    @torch.no_grad()
    def update(self, num_steps: int, interval: int = INTERVAL, due: bool | None = None) -> None:
        """Account for the parameters after step number ``num_steps``, from 1.

        Args:
            num_steps: The number of the step.
            interval: Steps between two updates.
            due: Whether the means are updated at this step; by default, at each multiple of ``interval``.
        """
        rate = min(interval / (self._fraction * num_steps), 1.0)
        if rate == 1.0:
            self.restart()
        elif num_steps % interval == 0 if due is None else due:
            for mean, parameter in zip(self.means, self._parameters, strict=True):
                mean.lerp_(parameter, rate)

    @torch.no_grad()
    def restart(self) -> None:
        """Set the means to the parameters."""
        for mean, parameter in zip(self.means, self._parameters, strict=True):
            mean.copy_(parameter)
