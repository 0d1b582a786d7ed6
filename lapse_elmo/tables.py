"""The only bridge between the server's rows and torch's tensors: tables of weights, updated through pushes.

A row in the server holds the weights and, after them, the state of the update rule: ``[weights | accumulators]``. Pulls
give the weights, pushes are gradients, and the server takes the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lapse_elmo.config.training import OptimizerConfig
from lapse_elmo.errors import CheckpointError
from lapse_elmo.ps.api import ParameterServer
from lapse_elmo.ps.layout import Segment
from lapse_elmo.ps.rules import Rule

DENSE_ROW = 1024  # weights in a row of the dense table: long enough to move fast, short enough to lock for a short time
_CHUNK_ROWS = 16384


def rule_of(config: OptimizerConfig, *, per_row: bool | None = None) -> Rule:
    """The update rule of rows.

    :param per_row: whether Adagrad has one accumulator per row; None for what ``--row-accumulators`` says.
    """
    one = config.row_accumulators == "row" if per_row is None else per_row
    return Rule("sgd" if config.optimizer == "sgd" else "adagrad", one, config.epsilon)


@dataclass(frozen=True)
class PulledRows:
    """Distinct rows as they were pulled: ``keys`` (n,) and ``weights`` (n, size)."""

    keys: np.ndarray
    weights: Tensor


class RowTable:
    """``num_rows`` x ``size`` weights that live in one segment of the server, which has an update rule.

    The learning rate of its pushes is that of ``server.set_rate``.

    :param initial_accumulator: what Adagrad's accumulators start at.
    """

    def __init__(self, server: ParameterServer, segment: Segment, initial_accumulator: float) -> None:
        self.server = server
        self.segment = segment
        self.size = segment.width
        self.initial_accumulator = initial_accumulator

    def pull(self, rows: np.ndarray) -> PulledRows:
        """The weights of the distinct ``rows`` (n,) int64."""
        keys = self.segment.keys(rows)
        weights = torch.empty(keys.size, self.size)
        self.server.pull(keys, weights)
        return PulledRows(keys, weights)

    def push(self, pulled: PulledRows, gradient: Tensor, scale: float) -> None:
        """One step of the update rule with ``scale * gradient`` (n, size)."""
        gradient = gradient.detach().to("cpu")
        self.server.push(pulled.keys, (gradient * scale if scale != 1 else gradient).contiguous())

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
                self.server.set(self.segment.keys(np.arange(first, end)), self.initial_rows(weights(first, end)))

    def initial_rows(self, weights: Tensor) -> Tensor:
        """Whole rows (n, row_width) of ``weights`` (n, size) before the first step."""
        state = weights.new_full((len(weights), self.segment.row_width - self.size), self.initial_accumulator)
        return torch.cat([weights, state], 1)

    def read(self, first: int, end: int) -> Tensor:
        """Whole rows [first, end), accumulators included, as (n, row_width)."""
        values = torch.empty(end - first, self.segment.row_width)
        self.server.pull_rows(self.segment.keys(np.arange(first, end)), values)
        return values

    def restored(self, values: np.ndarray) -> np.ndarray:
        """Whole rows (n, row_width) of saved rows (n, any), whose accumulators may be per element or per row.

        Those per element become their mean; that of a row becomes each element's.

        :raises CheckpointError: if they are the rows of another table.
        """
        wanted, found = self.segment.row_width - self.size, values.shape[1] - self.size
        if found == wanted:
            return values
        if found == self.size and wanted == 1:
            return np.concatenate([values[:, : self.size], values[:, self.size :].mean(1, keepdims=True)], 1)
        if found == 1 and wanted == self.size:
            return np.concatenate([values[:, : self.size], values[:, self.size :].repeat(self.size, 1)], 1)
        raise CheckpointError(
            f"the table {self.segment.name} has rows of {self.segment.row_width} numbers, the checkpoint of "
            f"{values.shape[1]}: give the --projection-size and --optimizer that it was trained with"
        )

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """All weights as (first row, (n, size)) in ascending chunks, without ever holding all rows."""
        for rows, weights in self.chunks_of(np.arange(self.segment.num_rows)):
            yield int(rows[0]), weights

    def chunks_of(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Weights of the distinct ``rows`` (n,) as (some of these rows (k,), (k, size)), in their order."""
        for first in range(0, rows.size, _CHUNK_ROWS):
            some = rows[first : first + _CHUNK_ROWS]
            yield some, self.pull(some).weights


class DenseTable:
    """Dense parameters kept in the server, flattened into rows of ``DENSE_ROW`` weights (zeros fill the last).

    Such a row is a cut through matrices and biases, so its rule should have an accumulator per element.
    """

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
        self.table.server.set(keys, self.table.initial_rows(self._flat(self.parameters)))

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
