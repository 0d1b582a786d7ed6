"""The formula of the traffic between nodes, against counts of the server's own code on the simulated network."""

from __future__ import annotations

import pytest

from lapse_elmo import native
from lapse_elmo.config.training import parse_train
from lapse_elmo.frequent_rows import frequent_in, node_use
from lapse_elmo.ps.rows import SOURCE
from lapse_elmo.ps.sampling import Distribution, Sampler
from lapse_elmo.traffic import NodeUse, row_traffic
from tests.simulator.scale import Counts, Workload, count

counted = pytest.mark.skipif(native.load(SOURCE) is None, reason="the simulator accesses rows through rows.c")

# Workers per node, V, S, tokens per worker and step. In the first, most rows are used by one node at a time; in the
# last, most of them by all.
SIZES = {"rare": (2, 60_000, 256, 300), "mixed": (4, 20_000, 512, 100), "common": (2, 1000, 200, 200)}
ROW_FLOATS = 1026


def counted_and_expected(
    size: str, num_nodes: int, *, share: bool = True, frequent: tuple[int, int] = (0, 0)
) -> tuple[Counts, dict[str, float], float]:
    """Return the counts; the formula's rows by kind, and its bytes."""
    workers, num_classes, num_samples, tokens = SIZES[size]
    workload = Workload(
        num_nodes, workers, num_classes, num_samples, tokens, ROW_FLOATS, steps=7, warm_up=3, share_samples=share,
        frequent=frequent,
    )
    traffic = row_traffic(workload.use, num_nodes, (4 * ROW_FLOATS, 4 * ROW_FLOATS), frequent)
    rows = {"moved": traffic.moved, "changed": traffic.changed, "refreshed": traffic.refreshed}
    return count(workload), rows, traffic.num_bytes


@counted
@pytest.mark.parametrize("num_nodes", [2, 3, 6, 12])
@pytest.mark.parametrize("size", SIZES)
def test_bytes_and_rows(size: str, num_nodes: int) -> None:
    counts, rows, num_bytes = counted_and_expected(size, num_nodes)
    assert num_bytes == pytest.approx(counts.sent_bytes, rel=0.1)
    kinds = counts.rows_by_kind
    seen = {
        "moved": kinds.get("Relocate", 0) + kinds.get("Replicate", 0), "changed": kinds.get("Deltas", 0),
        "refreshed": kinds.get("Refresh", 0),
    }
    whole = sum(seen.values())
    for name, expected in rows.items():
        assert expected == pytest.approx(seen[name], abs=0.1 * whole), (name, rows, seen)


@counted
def test_samples_that_each_worker_draws() -> None:
    counts, _, num_bytes = counted_and_expected("mixed", 4, share=False)
    assert num_bytes == pytest.approx(counts.sent_bytes, rel=0.1)


@counted
def test_frequent_rows_are_not_sent() -> None:
    """In the workload "mixed", 121 rows of the embedding and 350 of the softmax are used in a quarter of all steps."""
    workers, num_classes, num_samples, tokens = SIZES["mixed"]
    frequent = frequent_in(NodeUse(num_classes, tokens, workers, num_samples))
    assert 50 < frequent[0] < frequent[1] < num_samples
    all_bytes = counted_and_expected("mixed", 4)[0].sent_bytes
    counts, _, num_bytes = counted_and_expected("mixed", 4, frequent=frequent)
    assert num_bytes == pytest.approx(counts.sent_bytes, rel=0.1) and counts.sent_bytes < 0.65 * all_bytes


@pytest.mark.parametrize(("sharing", "drawers"), [("node", 1), ("job", 1), ("none", 6)])
def test_the_parts_of_a_rank_draw_as_ranks_do(sharing: str, drawers: int) -> None:
    """Two ranks of three parts each: at a step they draw so many different samples, which is what a plan counts."""
    samplers = [
        Sampler(Distribution("uniform", 10**6), "preloc", False, 1, rank, 0, sharing, parts=3) for rank in range(2)
    ]
    step = 5
    drawn = {tuple(sampler.draw(3 * step + part, 9).tolist()) for sampler in samplers for part in range(3)}
    config = parse_train(["--accumulate", "3", "--share-samples", sharing])
    assert len(drawn) == drawers == node_use(config, 10**6, 27, 2).drawers


def test_one_node_sends_nothing() -> None:
    traffic = row_traffic(NodeUse(1000, 50, 4, 100), 1, (100, 100))
    assert traffic.num_bytes == pytest.approx(0, abs=1e-6) and traffic.transmissions == 0


def test_the_full_softmax_synchronises_every_row() -> None:
    """If each node uses all V rows, no row moves, and each replica is sent to the owner and back."""
    use = NodeUse(100, 1, 1, 100)
    assert use.classes().tolist() == [1.0] * 100
    traffic = row_traffic(use, 4, (0, 0))
    assert traffic.changed > 75 and traffic.refreshed > 75


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("distribution", ["log-uniform", "uniform"])
def test_the_expected_sample_has_its_size(distribution: str, replacement: bool) -> None:
    """Without positions, the classes used are those of the sample: S distinct ones, or fewer with replacement."""
    used = NodeUse(500, 0, 1, 50, distribution=distribution, replacement=replacement).classes().sum()
    if replacement:
        assert 20 < used < 49
    else:
        assert used == pytest.approx(50, rel=1e-6)
