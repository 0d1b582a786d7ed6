"""The only bridge between the server's rows and torch's tensors: tables of weights, updated through pushes.

A row holds the weights and, side by side, the state of the update rule: ``[weights | accumulators]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lapse_elmo.config.training import OptimizerConfig
from lapse_elmo.model.optimizers import adagrad_delta, sgd_delta
from lapse_elmo.ps.api import ParameterServer
from lapse_elmo.ps.layout import Segment

DENSE_ROW = 1024  # weights in a row of the dense table: long enough to move fast, short enough to lock for a short time
_CHUNK_ROWS = 16384


@dataclass(frozen=True)
class UpdateRule:
    """How a gradient becomes what is added to a row."""

    config: OptimizerConfig

    @property
    def has_accumulators(self) -> bool:
        return self.config.optimizer == "adagrad"

    def width(self, size: int) -> int:
        """Floats of a row with ``size`` weights."""
        return size * (2 if self.has_accumulators else 1)

    def initial_rows(self, weights: Tensor) -> Tensor:
        """Rows (n, width) of ``weights`` (n, size) before the first step."""
        if not self.has_accumulators:
            return weights
        return torch.cat([weights, torch.full_like(weights, self.config.initial_accumulator)], 1)

    def deltas(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """What to push (n, width) for ``gradient`` (n, size) at ``rows`` (n, width)."""
        if not self.has_accumulators:
            return sgd_delta(gradient, self.config.learning_rate)
        size = gradient.shape[1]
        out = torch.empty_like(rows)
        adagrad_delta(
            gradient, rows[:, size:], self.config.learning_rate, self.config.epsilon, (out[:, :size], out[:, size:])
        )
        return out


@dataclass(frozen=True)
class PulledRows:
    """Distinct rows as they were pulled: ``keys`` (n,), ``rows`` (n, width), and a copy-free view of their weights."""

    keys: np.ndarray
    rows: Tensor
    weights: Tensor


class RowTable:
    """``num_rows`` x ``size`` weights that live in one segment of the server."""

    def __init__(self, server: ParameterServer, segment: Segment, size: int, rule: UpdateRule) -> None:
        self.server = server
        self.segment = segment
        self.size = size
        self.rule = rule

    def pull(self, rows: np.ndarray) -> PulledRows:
        """The distinct ``rows`` (n,) int64."""
        keys = self.segment.keys(rows)
        values = torch.empty(keys.size, self.segment.width)
        self.server.pull(keys, values)
        return PulledRows(keys, values, values[:, : self.size])

    def push(self, pulled: PulledRows, gradient: Tensor, scale: float) -> None:
        """One step of the update rule with ``scale * gradient`` (n, size)."""
        gradient = gradient.detach().to("cpu")
        self.server.push(pulled.keys, self.rule.deltas(gradient * scale if scale != 1 else gradient, pulled.rows))

    def intent(self, rows: np.ndarray, start: int, end: int) -> None:
        """Announce that ``rows`` will be used in the clocks [start, end)."""
        self.server.intent(self.segment.keys(rows), start, end)

    def initialise(self, worker: int, num_workers: int, weights: Callable[[int, int], Tensor]) -> None:
        """Set this worker's share of the rows. ``weights(first, end)`` gives rows of one chunk as (n, size).

        Chunks have the same bounds in every world, so the values may be keyed by them.
        """
        for number, first in enumerate(range(0, self.segment.num_rows, _CHUNK_ROWS)):
            if number % num_workers == worker:
                end = min(first + _CHUNK_ROWS, self.segment.num_rows)
                self.server.set(self.segment.keys(np.arange(first, end)), self.rule.initial_rows(weights(first, end)))

    def read(self, first: int, end: int) -> Tensor:
        """Rows [first, end) as they are (n, width), accumulators included."""
        values = torch.empty(end - first, self.segment.width)
        self.server.pull(self.segment.keys(np.arange(first, end)), values)
        return values

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """All weights as (first row, (n, size)) in ascending chunks, without ever holding all rows."""
        for first in range(0, self.segment.num_rows, _CHUNK_ROWS):
            end = min(first + _CHUNK_ROWS, self.segment.num_rows)
            yield first, self.read(first, end)[:, : self.size]


class DenseTable:
    """Dense parameters kept in the server, flattened into rows of ``DENSE_ROW`` weights (zeros fill the last)."""

    def __init__(self, table: RowTable, parameters: Sequence[Tensor]) -> None:
        self.table = table
        self.parameters = list(parameters)
        self._rows = np.arange(table.segment.num_rows)
        self._pulled: PulledRows | None = None

    @staticmethod
    def num_rows(parameters: Sequence[Tensor]) -> int:
        return -(-sum(p.numel() for p in parameters) // DENSE_ROW)

    def initialise(self) -> None:
        """Set the rows to the parameters' values; for one worker to call."""
        keys = self.table.segment.keys(self._rows)
        self.table.server.set(keys, self.table.rule.initial_rows(self._flat(self.parameters)))

    @torch.no_grad()
    def pull(self) -> None:
        """Copy the server's values into the parameters."""
        self._pulled = self.table.pull(self._rows)
        flat = self._pulled.weights.reshape(-1)
        start = 0
        for parameter in self.parameters:
            parameter.copy_(flat[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()

    def push(self, gradients: Sequence[Tensor], scale: float) -> None:
        """One step of the update rule on the rows pulled last."""
        assert self._pulled is not None
        self.table.push(self._pulled, self._flat(gradients), scale)

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        out = torch.zeros(self.table.segment.num_rows * DENSE_ROW)
        start = 0
        for tensor in tensors:
            out[start : start + tensor.numel()] = tensor.detach().reshape(-1).to("cpu")
            start += tensor.numel()
        return out.view(-1, DENSE_ROW)
