"""Tables: a push changes rows as torch.optim changes a parameter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lapse_elmo.config.training import OptimizerConfig
from lapse_elmo.errors import CheckpointError
from lapse_elmo.mpi.world import solo
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.rng import torch_stream
from lapse_elmo.tables import DENSE_ROW, DenseTable, RowTable, rule_of

ROWS, SIZE = 50, 7
ADAGRAD, SGD = OptimizerConfig(row_accumulators="element"), OptimizerConfig(optimizer="sgd")
PER_ROW = OptimizerConfig(row_accumulators="row", initial_accumulator=0.5)


def row_table(config: OptimizerConfig, num_rows: int = ROWS, size: int = SIZE) -> RowTable:
    """Return a table of a new server, in which another segment precedes it."""
    layout = Layout.of(("other", 13, 5), ("table", num_rows, size, rule_of(config)))
    server = EmbeddedServer(solo(), layout)
    server.set_rate("table", config.learning_rate)
    return RowTable(server, layout["table"], config.initial_accumulator)


def gaussian(first: int, end: int) -> Tensor:
    return torch.randn(end - first, SIZE, generator=torch_stream(3, "test", first))


def optimizer_of(config: OptimizerConfig, parameter: Tensor) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD([parameter], lr=config.learning_rate)
    return torch.optim.Adagrad(
        [parameter], lr=config.learning_rate, eps=config.epsilon, initial_accumulator_value=config.initial_accumulator
    )


@pytest.mark.parametrize("config", [ADAGRAD, SGD], ids=["adagrad", "sgd"])
def test_steps_are_those_of_torch_on_sparse_gradients(config: OptimizerConfig) -> None:
    """Gradients of a repeated row are summed first, here by the caller's index_add, there by coalescing."""
    table = row_table(config)
    table.initialise(0, 1, gaussian)
    reference = gaussian(0, ROWS).requires_grad_()
    optimizer = optimizer_of(config, reference)
    rng = np.random.default_rng(0)
    for scale in (1.0, 0.25, 1.0, 0.5):
        occurrences = rng.integers(0, ROWS, 40)
        gradients = torch.from_numpy(rng.normal(size=(40, SIZE)).astype(np.float32)) * 5
        rows, inverse = np.unique(occurrences, return_inverse=True)
        summed = torch.zeros(rows.size, SIZE).index_add_(0, torch.from_numpy(inverse), gradients)
        pulled = table.pull(rows)
        torch.testing.assert_close(pulled.weights, reference.detach()[rows], rtol=1e-6, atol=1e-6)
        table.push(pulled.keys, summed, scale)
        reference.grad = torch.sparse_coo_tensor(
            torch.from_numpy(occurrences)[None], gradients * scale, (ROWS, SIZE), check_invariants=True
        )
        optimizer.step()
    torch.testing.assert_close(table.read(0, ROWS)[:, :SIZE], reference.detach(), rtol=1e-6, atol=1e-6)
    if config.optimizer == "adagrad":
        sums = optimizer.state[reference]["sum"]
        torch.testing.assert_close(table.read(0, ROWS)[:, SIZE:], sums, rtol=1e-6, atol=1e-6)


def test_one_accumulator_per_row() -> None:
    """An accumulator per row grows by the gradient's mean square, and its root divides the whole step."""
    table = row_table(PER_ROW)
    table.initialise(0, 1, gaussian)
    before, gradient = table.read(0, ROWS), gaussian(0, 3) * 4
    assert before.shape == (ROWS, SIZE + 1) and (before[:, SIZE] == 0.5).all()
    table.push(table.segment.keys(np.arange(3)), gradient, 0.5)
    sums = 0.5 + (gradient * 0.5).square().mean(1)
    expected = before[:3, :SIZE] - 0.2 * 0.5 * gradient / (sums.sqrt() + 1e-7)[:, None]
    torch.testing.assert_close(table.read(0, 3), torch.cat([expected, sums[:, None]], 1), rtol=1e-6, atol=1e-6)
    assert torch.equal(table.read(3, ROWS), before[3:])


@pytest.mark.parametrize("later", [True, False])
def test_the_rate_is_the_servers(later: bool) -> None:
    table = row_table(SGD)
    table.initialise(0, 1, gaussian)
    table.server.set_rate("table", 0.5 if later else 0.25)
    table.push(table.segment.keys(np.array([2])), torch.ones(1, SIZE), 1.0)
    torch.testing.assert_close(table.read(2, 3), gaussian(0, ROWS)[2:3] - (0.5 if later else 0.25))


def test_saved_rows_of_other_accumulators() -> None:
    """Per element to per row by the mean, per row to per element by copies; other rows are refused."""
    element, row = row_table(ADAGRAD), row_table(PER_ROW)
    saved = np.arange(2 * 2 * SIZE, dtype=np.float32).reshape(2, -1)
    assert element.restored(saved) is saved
    one = row.restored(saved)
    np.testing.assert_array_equal(one[:, :SIZE], saved[:, :SIZE])
    np.testing.assert_array_equal(one[:, SIZE:], saved[:, [SIZE + SIZE // 2]])  # of consecutive numbers
    back = element.restored(one)
    np.testing.assert_array_equal(back[:, :SIZE], saved[:, :SIZE])
    np.testing.assert_array_equal(back[:, SIZE:], one[:, [SIZE] * SIZE])
    with pytest.raises(CheckpointError, match=r"table has rows of 8 numbers, the checkpoint of 15: give "):
        row.restored(np.zeros((2, 15), np.float32))


def test_untouched_rows_keep_their_bits() -> None:
    table = row_table(ADAGRAD)
    table.initialise(0, 1, gaussian)
    before = table.read(0, ROWS)
    table.push(table.segment.keys(np.array([4, 9])), torch.ones(2, SIZE), 1.0)
    after = table.read(0, ROWS)
    same = (before == after).all(1)
    assert (~same).nonzero().flatten().tolist() == [4, 9]


def test_pulled_rows_are_a_snapshot() -> None:
    """Pulled rows do not change with later pushes, and changing them does not change the server."""
    table = row_table(ADAGRAD)
    table.initialise(0, 1, gaussian)
    pulled = table.pull(np.array([1]))
    kept = pulled.weights.clone()
    table.push(pulled.keys, torch.ones(1, SIZE), 1.0)
    assert torch.equal(pulled.weights, kept)
    assert not torch.equal(table.pull(np.array([1])).weights, kept)
    pulled.weights.fill_(99)
    assert not (table.read(0, ROWS) == 99).any()


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_initial_rows_do_not_depend_on_the_number_of_workers(
    monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setattr("lapse_elmo.tables._CHUNK_ROWS", 8)  # seven chunks, the last one short
    alone, shared = row_table(ADAGRAD), row_table(ADAGRAD)
    alone.initialise(0, 1, gaussian)
    for worker in reversed(range(num_workers)):
        shared.initialise(worker, num_workers, gaussian)
    assert torch.equal(alone.read(0, ROWS), shared.read(0, ROWS))
    assert torch.equal(alone.read(8, 16)[:, :SIZE], gaussian(8, 16))
    assert (alone.read(0, ROWS)[:, SIZE:] == 1).all()


def test_chunks_are_all_rows_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapse_elmo.tables._CHUNK_ROWS", 8)
    table = row_table(ADAGRAD)
    table.initialise(0, 1, gaussian)
    chunks = list(table.chunks())
    assert [first for first, _ in chunks] == list(range(0, ROWS, 8))
    assert torch.equal(torch.cat([rows for _, rows in chunks]), table.read(0, ROWS)[:, :SIZE])


def test_intent_names_rows_of_the_segment() -> None:
    table = row_table(ADAGRAD)
    table.intent(np.arange(ROWS), 0, 1)
    assert table.server.stats.intended_rows == ROWS


@pytest.mark.parametrize("config", [ADAGRAD, SGD], ids=["adagrad", "sgd"])
def test_dense_table_trains_as_torch_does(config: OptimizerConfig) -> None:
    generator = torch_stream(0, "test")
    shapes = [(3, 500), (7,), (1,), (40, 31)]
    own = [torch.randn(shape, generator=generator) for shape in shapes]
    reference = [parameter.clone().requires_grad_() for parameter in own]
    optimizers = [optimizer_of(config, parameter) for parameter in reference]
    dense = DenseTable(row_table(config, DenseTable.num_rows(own), DENSE_ROW), own)
    dense.initialise()
    for parameter in own:
        parameter.zero_()
    dense.pull()
    assert all(torch.equal(a, b) for a, b in zip(own, reference, strict=True))
    for _ in range(3):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        dense.push(gradients, 0.5)
        for parameter, gradient, optimizer in zip(reference, gradients, optimizers, strict=True):
            parameter.grad = gradient * 0.5
            optimizer.step()
        dense.pull()
    for a, b in zip(own, reference, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("numel", "rows"), [(1, 1), (DENSE_ROW, 1), (DENSE_ROW + 1, 2)])
def test_dense_rows(numel: int, rows: int) -> None:
    assert DenseTable.num_rows([torch.zeros(numel)]) == rows
