"""Tables of weights in the parameter server, and their way to a GPU: the only bridge between rows and torch's tensors.

A row in the server holds the weights, followed by the state of the update rule: ``[weights | accumulators]``. A pull
returns the weights; a push sends gradients, and the server applies the update rule.
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

DENSE_ROW = 1024  # weights per row of the dense table: long enough to copy fast, short enough to lock briefly
_CHUNK_ROWS = 16384  # rows per call of the server; initial values depend on it: each chunk has a random stream


def rule_of(config: OptimizerConfig, *, per_row: bool | None = None) -> Rule:
    """Return the update rule of rows.

    Args:
        config: The options.
        per_row: Whether Adagrad has one accumulator per row instead of one per weight; None for the choice of
            --row-accumulators.
    """
    one = config.row_accumulators == "row" if per_row is None else per_row
    return Rule("sgd" if config.optimizer == "sgd" else "adagrad", one, config.epsilon)


@dataclass(frozen=True)
class PulledRows:
    """Distinct rows as they were pulled: ``keys`` (n,) int64 and ``weights`` (n, size) float32."""

    keys: np.ndarray
    weights: Tensor


class Uploader:
    """Copies rows to ``device``; to a GPU through pinned memory, on a CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, rows: Tensor) -> Callable[[], Tensor]:
        """Begin to copy ``rows`` (n, width), contiguous or strided.

        With a GPU ``rows`` may be overwritten as soon as this returns, and the host never waits for the copy: GPU work
        that is queued after the returned function was called waits for it on the device.

        Returns:
            A function that returns the copy, contiguous, on the device. On the CPU it may be ``rows`` itself.
        """
        stream = self._stream
        if stream is None:
            return lambda: rows.to(self.device).contiguous()
        pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)
        with torch.cuda.stream(stream):
            copy = pinned.to(self.device, non_blocking=True)
        arrived = stream.record_event()  # of this copy: waiting for the whole stream would include later copies

        def take() -> Tensor:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            copy.record_stream(current)  # the allocator must not reuse its memory before this stream is done with it
            return copy

        return take


class RowTable:
    """Weights (num_rows, size) in one segment of the server, which has an update rule.

    The learning rate of its pushes is set by ``server.set_rate``.

    Args:
        server: The server.
        segment: The segment of the table.
        initial_accumulator: Initial value of Adagrad's accumulators.
    """

    def __init__(self, server: ParameterServer, segment: Segment, initial_accumulator: float) -> None:
        self.server = server
        self.segment = segment
        self.size = segment.width
        self.initial_accumulator = initial_accumulator

    def pull(self, rows: np.ndarray) -> PulledRows:
        """Return the weights of the distinct ``rows`` (n,) int64."""
        keys = self.segment.keys(rows)
        weights = torch.empty(keys.size, self.size)
        self.server.pull(keys, weights)
        return PulledRows(keys, weights)

    def push(self, keys: np.ndarray, gradient: Tensor, scale: float) -> None:
        """Apply the update rule once to the rows of the distinct ``keys`` (n,), with ``scale * gradient`` (n, size)."""
        gradient = gradient.detach().to("cpu")
        self.server.push(keys, (gradient * scale if scale != 1 else gradient).contiguous())

    def intent(self, rows: np.ndarray, start: int, end: int) -> None:
        """Announce that ``rows`` will be used in the clocks [start, end)."""
        self.server.intent(self.segment.keys(rows), start, end)

    def initialise(self, worker: int, num_workers: int, weights: Callable[[int, int], Tensor]) -> None:
        """Set this worker's share of the rows to their initial values.

        Args:
            worker: Index of this worker.
            num_workers: The number of workers.
            weights: ``weights(first, end)`` returns rows [first, end) as (n, size). It is called for chunks that have
                the same bounds for any number of workers, so random values may be keyed by ``first``.
        """
        for number, first in enumerate(range(0, self.segment.num_rows, _CHUNK_ROWS)):
            if number % num_workers == worker:
                end = min(first + _CHUNK_ROWS, self.segment.num_rows)
                self.server.set(self.segment.keys(np.arange(first, end)), self.initial_rows(weights(first, end)))

    def initial_rows(self, weights: Tensor) -> Tensor:
        """Return whole rows (n, row_width): ``weights`` (n, size) and initial accumulators."""
        state = weights.new_full((len(weights), self.segment.row_width - self.size), self.initial_accumulator)
        return torch.cat([weights, state], 1)

    def read(self, first: int, end: int) -> Tensor:
        """Return rows [first, end), accumulators included, as (n, row_width)."""
        values = torch.empty(end - first, self.segment.row_width)
        self.server.pull_rows(self.segment.keys(np.arange(first, end)), values)
        return values

    def restored(self, values: np.ndarray) -> np.ndarray:
        """Convert saved rows to rows of this table, whose accumulators may be per weight or per row.

        Accumulators per weight are replaced by their mean, an accumulator per row by copies of it.

        Args:
            values: (n, width) saved rows, accumulators included.

        Returns:
            The rows as (n, row_width).

        Raises:
            CheckpointError: If their width does not fit this table.
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
        """Yield all weights in ascending chunks as (first row, (n, size)), without ever holding all rows."""
        for rows, weights in self.chunks_of(np.arange(self.segment.num_rows)):
            yield int(rows[0]), weights

    def chunks_of(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield the weights of the distinct ``rows`` (n,) in chunks, in their order, as (rows (k,), (k, size))."""
        for first in range(0, rows.size, _CHUNK_ROWS):
            some = rows[first : first + _CHUNK_ROWS]
            yield some, self.pull(some).weights


class DenseTable:
    """Dense parameters in the server, flattened into rows of ``DENSE_ROW`` weights (the last one padded with zeros).

    A row may span matrices and biases, so its update rule should have an accumulator per weight.
    """

    def __init__(self, table: RowTable, parameters: Sequence[Tensor]) -> None:
        self.table = table
        self.parameters = list(parameters)
        self._rows = np.arange(table.segment.num_rows)

    @staticmethod
    def num_rows(parameters: Sequence[Tensor]) -> int:
        """Return how many rows ``parameters`` take."""
        return -(-sum(p.numel() for p in parameters) // DENSE_ROW)

    def initialise(self) -> None:
        """Set the rows to the parameters' values; one worker must call this."""
        keys = self.table.segment.keys(self._rows)
        self.table.server.set(keys, self.table.initial_rows(self._flat(self.parameters)))

    @torch.no_grad()
    def pull(self) -> None:
        """Copy the server's values into the parameters."""
        flat = self.table.pull(self._rows).weights.reshape(-1)
        start = 0
        for parameter in self.parameters:
            parameter.copy_(flat[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()

    def push(self, gradients: Sequence[Tensor], scale: float) -> None:
        """Apply the update rule once, with ``scale`` times the gradients."""
        self.table.push(self.table.segment.keys(self._rows), self._flat(gradients), scale)

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        out = torch.zeros(self.table.segment.num_rows * DENSE_ROW)
        start = 0
        for tensor in tensors:
            out[start : start + tensor.numel()] = tensor.detach().reshape(-1).to("cpu")
            start += tensor.numel()
        return out.view(-1, DENSE_ROW)
