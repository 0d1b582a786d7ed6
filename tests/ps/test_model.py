"""Any order of calls from any rank on several nodes, compared with a sequential model of the rows.

The calls come one at a time, so the model is exact for rows with one copy. With replicas it bounds each pull: a worker
sees what it has completed itself, and may or may not see what others have pushed since the last quiesce. Deltas are
positive, so that bounds are simple, and integers, so that sums are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from lapse_elmo.ps.api import DONE
from lapse_elmo.ps.layout import Layout, Segment
from lapse_elmo.ps.sampling import SCHEMES, Distribution, Sampler
from tests.ps.puppets import Stage

RANKS = 4
LAYOUT = Layout.of(("a", 9, 2), ("b", 1, 5), ("c", 40, 3))
ONE_COPY = ("relocation", "static")
SEGMENTS = st.sampled_from(LAYOUT.segments)
SEEDS = st.integers(0, 2**32 - 1)
WORKERS = st.integers(0, RANKS - 1)
VERBS = ("localize", "intent")


@dataclass
class Begun:
    """A pending call: its rank, segment and rows, with a pull's bounds or a push's sums by row."""

    rank: int
    ticket: int
    segment: Segment
    rows: np.ndarray
    low: np.ndarray
    high: np.ndarray


class AnyOrderOfCalls(RuleBasedStateMachine):
    """By segment: the sequential model ``rows``, and the bounds ``low[rank]`` and ``high`` of a pull.

    ``unsettled[rank]``: rows to which this rank has pushed and whose replicas may not all have received it yet.
    """

    def __init__(self, stage: Stage, technique: str) -> None:
        super().__init__()
        self.stage, self.technique, self.one_copy = stage, technique, technique in ONE_COPY
        shapes = {s.name: (s.num_rows, s.width) for s in LAYOUT.segments}
        self.rows = {name: np.zeros(shape) for name, shape in shapes.items()}
        self.high = {name: np.zeros(shape) for name, shape in shapes.items()}
        self.low = {name: np.zeros((RANKS, *shape)) for name, shape in shapes.items()}
        self.unsettled = {name: np.zeros((RANKS, shape[0]), bool) for name, shape in shapes.items()}
        self.pulls: list[Begun] = []
        self.pushes: list[Begun] = []
        self.clocks = [0] * RANKS
        self.handles: dict[tuple[int, int], int] = {}

    @initialize(scheme=st.sampled_from(SCHEMES), replacement=st.booleans())
    def open(self, scheme: str, replacement: bool) -> None:
        law = Distribution("log-uniform", LAYOUT["c"].num_rows)
        self.samplers = [Sampler(law, scheme, replacement, seed=1, worker=rank) for rank in range(RANKS)]
        self.stage.start()
        self.stage.each("open", [(LAYOUT, ("c", sampler), self.technique) for sampler in self.samplers])

    @rule(rank=WORKERS, segment=SEGMENTS, seed=SEEDS, count=st.integers(0, 50))
    def pull(self, rank, segment, seed, count) -> None:  # type: ignore[no-untyped-def]
        rows = np.random.default_rng(seed).integers(segment.num_rows, size=count)
        out = self.stage.on(rank, "pull", segment.keys(rows), segment.width)
        self._check(out, self.low[segment.name][rank][rows], self.high[segment.name][rows])

    @rule(rank=WORKERS, segment=SEGMENTS, seed=SEEDS, count=st.integers(1, 50))
    def begin_pull(self, rank, segment, seed, count) -> None:  # type: ignore[no-untyped-def]
        rows = np.random.default_rng(seed).integers(segment.num_rows, size=count)
        low, high = self.low[segment.name][rank][rows], self.high[segment.name][rows]
        ticket, out = self.stage.on(rank, "begin_pull", segment.keys(rows), segment.width)
        if ticket == DONE:
            self._check(out, low, high)
        else:
            self.pulls.append(Begun(rank, ticket, segment, rows, low, high))

    @precondition(lambda self: self.pulls)
    @rule(data=st.data())
    def end_pull(self, data: st.DataObject) -> None:
        self._end_pull(data.draw(st.integers(0, len(self.pulls) - 1)))

    @rule(rank=WORKERS, segment=SEGMENTS, seed=SEEDS, count=st.integers(0, 50), later=st.booleans())
    def push(self, rank, segment, seed, count, later) -> None:  # type: ignore[no-untyped-def]
        rng = np.random.default_rng(seed)
        rows = rng.integers(segment.num_rows, size=count)
        deltas = rng.integers(1, 10, (count, segment.width)).astype(np.float32)
        sums = np.zeros((segment.num_rows, segment.width))
        np.add.at(sums, rows, deltas)
        ticket = self.stage.on(rank, "call", "push_async", segment.keys(rows), deltas)
        self.rows[segment.name] += sums
        self._raise(segment, self.high[segment.name] + sums)
        self.unsettled[segment.name][rank, rows] = not self.one_copy
        self.pushes.append(Begun(rank, ticket, segment, np.unique(rows), sums, sums))
        if not later or ticket == DONE:
            self._end_push(len(self.pushes) - 1)

    @precondition(lambda self: self.pushes)
    @rule(data=st.data())
    def end_push(self, data: st.DataObject) -> None:
        self._end_push(data.draw(st.integers(0, len(self.pushes) - 1)))

    @rule(rank=WORKERS, segment=SEGMENTS, seed=SEEDS)
    def set(self, rank, segment, seed) -> None:  # type: ignore[no-untyped-def]
        """Set rows that have no pending push, nor deltas of a push on another node's replica."""
        rng, name = np.random.default_rng(seed), segment.name
        rows = rng.permutation(segment.num_rows)[: rng.integers(segment.num_rows + 1)]
        own = [r for r in range(RANKS) if self.stage.node_of(r) == self.stage.node_of(rank)]
        unsettled = np.any(np.delete(self.unsettled[name], own, 0), axis=0)
        for begun in self.pushes:
            if begun.segment == segment:
                unsettled[begun.rows] = True
        rows = rows[~unsettled[rows]]
        values = rng.integers(0, 10, (rows.size, segment.width)).astype(np.float32)
        self.stage.on(rank, "call", "set", segment.keys(rows), values)
        self.rows[name][rows] = values
        high = self.high[name].copy()
        high[rows] = values if self.one_copy else np.maximum(high[rows], values)
        self._raise(segment, high)
        for other in range(RANKS):
            sees = self.one_copy or other == rank
            before = self.low[name][other, rows]
            self.low[name][other, rows] = values if sees else np.minimum(before, values)
        for begun in self.pulls:
            if begun.segment == segment:
                begun.low = np.minimum(begun.low, self.low[name][begun.rank][begun.rows])

    @rule(rank=WORKERS, segment=SEGMENTS, seed=SEEDS, count=st.integers(0, 30), verb=st.sampled_from(VERBS))
    def bring(self, rank, segment, seed, count, verb) -> None:  # type: ignore[no-untyped-def]
        rng = np.random.default_rng(seed)
        keys = segment.keys(rng.integers(segment.num_rows, size=count))
        start = self.clocks[rank] + int(rng.integers(0, 4))
        clocks = (start, start + int(rng.integers(1, 5))) if verb == "intent" else ()
        self.stage.on(rank, "call", verb, keys, *clocks)

    @rule(rank=WORKERS)
    def advance_clock(self, rank: int) -> None:
        self.clocks[rank] += 1
        assert self.stage.on(rank, "call", "advance_clock") == self.clocks[rank]

    @rule(rank=WORKERS, count=st.integers(1, 40))
    def prepare_sample(self, rank: int, count: int) -> None:
        clock = self.clocks[rank]
        handle = self.stage.on(rank, "call", "prepare_sample", count, clock, clock + 2)
        assert (rank, handle) not in self.handles
        self.handles[rank, handle] = count

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def pull_sample(self, data: st.DataObject) -> None:
        rank, handle = data.draw(st.sampled_from(sorted(self.handles)))
        count, sampler = self.handles.pop((rank, handle)), self.samplers[rank]
        keys, out = self.stage.on(rank, "pull_sample", handle, count, LAYOUT["c"].width)
        rows = keys - LAYOUT["c"].first_key
        if sampler.scheme == "local":
            assert rows.min() >= 0 and rows.max() < sampler.distribution.num_rows
            assert sampler.replacement or np.unique(rows).size == count
        else:
            np.testing.assert_array_equal(rows, sampler.draw(handle, count))
        self._check(out, self.low["c"][rank][rows], self.high["c"][rows])

    @rule()
    def quiesce(self) -> None:
        """Quiesce; then all ranks see exactly the same rows."""
        self._end_all()
        self.stage.on_all("call", "quiesce")
        for segment in LAYOUT.segments:
            outs = self.stage.on_all("pull", segment.keys(np.arange(segment.num_rows)), segment.width)
            for out in outs[1:]:
                np.testing.assert_array_equal(out, outs[0])
            np.testing.assert_array_equal(outs[0], self.rows[segment.name])
            self.high[segment.name][:] = self.low[segment.name][:] = self.rows[segment.name]
            self.unsettled[segment.name][:] = False

    @rule(segment=SEGMENTS)
    def owned_rows(self, segment: Segment) -> None:
        self.quiesce()
        rows = np.concatenate(self.stage.on_all("call", "owned_rows", segment.name))
        np.testing.assert_array_equal(np.sort(rows), np.arange(segment.num_rows))

    def teardown(self) -> None:
        if self.stage.running and hasattr(self, "samplers"):
            self.stage.on_all("call", "close")

    def _raise(self, segment: Segment, high: np.ndarray) -> None:
        """Raise ``high``, which bounds what may be seen from now on, by pending pulls too."""
        self.high[segment.name] = high
        for begun in self.pulls:
            if begun.segment == segment:
                begun.high = np.maximum(begun.high, high[begun.rows])

    def _end_pull(self, place: int) -> None:
        begun = self.pulls.pop(place)
        self._check(self.stage.on(begun.rank, "end_pull", begun.ticket), begun.low, begun.high)

    def _end_push(self, place: int) -> None:
        begun = self.pushes.pop(place)
        self.stage.on(begun.rank, "call", "wait", begun.ticket)
        who = slice(None) if self.one_copy else begun.rank
        self.low[begun.segment.name][who] += begun.low

    def _end_all(self) -> None:
        while self.pulls:
            self._end_pull(0)
        while self.pushes:
            self._end_push(0)

    @staticmethod
    def _check(out: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        bad = np.flatnonzero(~((low <= out) & (out <= high)).all(1))
        assert not bad.size, f"{out[bad[0]]} is not between {low[bad[0]]} and {high[bad[0]]}"


@pytest.fixture(scope="module", params=[2, 4])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with Stage(RANKS, request.param) as stage:
        yield stage


@pytest.mark.parametrize("technique", ["adaptive", "relocation", "replication", "static"])
def test_any_order_of_calls(stage: Stage, technique: str) -> None:
    run_state_machine_as_test(
        partial(AnyOrderOfCalls, stage, technique),  # type: ignore[arg-type]
        settings=settings(max_examples=8, stateful_step_count=40, phases=[Phase.generate]),
    )
