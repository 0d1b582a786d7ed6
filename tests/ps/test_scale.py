"""Costs of a step at several numbers of nodes: no state of size nodes x rows, and messages linear in the nodes.

benchmarks/scale.py counts the same at 64 nodes of 32 workers.
"""

from __future__ import annotations

import pytest

from lapse_elmo import native
from lapse_elmo.ps.ring import RING_BYTES
from lapse_elmo.ps.rows import SOURCE
from tests.simulator.scale import Counts, Workload, count

pytestmark = pytest.mark.skipif(native.load(SOURCE) is None, reason="the simulator accesses rows through rows.c")

CLASSES, WORKERS = 20_000, 2
SIZES = (3, 12)


@pytest.fixture(scope="module")
def counts() -> dict[int, Counts]:
    return {
        nodes: count(Workload(nodes, WORKERS, CLASSES, num_samples=256, num_tokens=200, steps=5)) for nodes in SIZES
    }


@pytest.mark.parametrize("nodes", SIZES)
def test_transmissions_per_step_and_node(counts: dict[int, Counts], nodes: int) -> None:
    assert counts[nodes].transmissions <= 5 * nodes  # 3.5 with many nodes and rows


@pytest.mark.parametrize("nodes", SIZES)
def test_bookkeeping_is_a_hundred_bytes_per_row(counts: dict[int, Counts], nodes: int) -> None:
    assert counts[nodes].bookkeeping_bytes - WORKERS * RING_BYTES <= 100 * CLASSES


@pytest.mark.parametrize("nodes", SIZES)
def test_announced_rows_are_local(counts: dict[int, Counts], nodes: int) -> None:
    assert counts[nodes].remote_share < 0.02


def test_bytes_per_step_and_node_do_not_grow_with_nodes(counts: dict[int, Counts]) -> None:
    few, many = (counts[nodes].sent_bytes for nodes in SIZES)
    assert many < 2.5 * few, "a node's traffic is that of the rows that it uses, whatever the number of nodes"
