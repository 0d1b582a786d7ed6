"""Update rules over a package that can only add: the adapter's work, on a stand-in for the package's worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lapse_elmo.errors import ServerError
from lapse_elmo.mpi.world import solo
from lapse_elmo.ps.api import DONE
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.lapse_package import LapseServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.rules import Rule

WIDTH, ROWS = 5, 20
RULES = {"sgd": Rule("sgd"), "adagrad": Rule("adagrad"), "per row": Rule("adagrad", per_row=True)}


class AddingWorker:
    """Rows of one width in memory; every call completes at once."""

    def __init__(self, num_rows: int, width: int) -> None:
        self.rows = np.zeros((num_rows, width), np.float32)

    def pull(self, keys: np.ndarray, out: np.ndarray, later: bool) -> int:
        assert out.shape == (keys.size, self.rows.shape[1]) and np.unique(keys).size == keys.size
        out[:] = self.rows[keys]
        return DONE

    def push(self, keys: np.ndarray, values: np.ndarray, later: bool) -> int:
        assert values.shape == (keys.size, self.rows.shape[1]) and values.flags.c_contiguous
        np.add.at(self.rows, keys, values)
        return DONE

    def wait(self, timestamp: int) -> None:
        raise AssertionError("a call that was complete is waited for")

    def set(self, keys: np.ndarray, values: np.ndarray) -> None:
        self.rows[keys] = values


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("later", [False, True])
def test_steps_are_those_of_the_embedded_engine(rule: Rule, later: bool) -> None:
    layout = Layout.of(("rows", ROWS, WIDTH, rule))
    worker = AddingWorker(ROWS, layout["rows"].row_width)
    node: Any = SimpleNamespace(layout=layout, worker=worker)
    package, embedded = LapseServer(solo(), layout, node=node), EmbeddedServer(solo(), layout)
    rng = np.random.default_rng(0)
    with pytest.raises(ServerError, match="call set_rate first"):
        package.push(np.arange(2), np.ones((2, WIDTH), np.float32))
    first = np.abs(rng.normal(size=(ROWS, layout["rows"].row_width))).astype(np.float32)
    for server in (package, embedded):
        server.set(np.arange(ROWS), first)
    for number, keys in enumerate((np.arange(ROWS), np.array([3, 3, 7, 3]), rng.integers(0, ROWS, 30), np.array([9]))):
        gradients = rng.normal(size=(keys.size, WIDTH)).astype(np.float32)
        weights, rows = [], []
        for server in (package, embedded):
            server.set_rate("rows", 0.1 * (number + 1))
            server.wait(server.push_async(keys, gradients)) if later else server.push(keys, gradients)
            weights.append(np.empty((keys.size, WIDTH), np.float32))
            server.wait(server.pull_async(keys, weights[-1])) if later else server.pull(keys, weights[-1])
            rows.append(np.empty((ROWS, layout["rows"].row_width), np.float32))
            server.pull_rows(np.arange(ROWS), rows[-1])
        np.testing.assert_allclose(weights[0], weights[1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5, atol=1e-6)
    assert any("update rules" in emulated for emulated in package.emulated)
    embedded.close()
