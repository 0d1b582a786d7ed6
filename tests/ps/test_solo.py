"""The embedded engine in a world of one process: any order of calls against a plain array, and refused calls."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lapse_elmo.errors import ConfigError, ServerError
from lapse_elmo.mpi.world import solo
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.sampling import SCHEMES, Distribution, Sampler
from lapse_elmo.ps.trace import TracedServer

LAYOUT = Layout.of(("a", 7, 2), ("b", 1, 5), ("c", 30, 3))
SEGMENTS = st.sampled_from(LAYOUT.segments)
SEEDS = st.integers(0, 2**32 - 1)


class AnyOrderOfCalls(RuleBasedStateMachine):
    """After every call rows equal those of a sequential model."""

    def __init__(self) -> None:
        super().__init__()
        sampler = Sampler(Distribution("uniform", 30), "naive", True, seed=1, worker=0)
        self.server = EmbeddedServer(solo(), LAYOUT, ("c", sampler))
        self.model = {segment.name: np.zeros((segment.num_rows, segment.width)) for segment in LAYOUT.segments}
        self.handles: dict[int, int] = {}
        self.clock = 0

    @rule(segment=SEGMENTS, seed=SEEDS, count=st.integers(0, 40))
    def push(self, segment, seed, count) -> None:  # type: ignore[no-untyped-def]
        rng = np.random.default_rng(seed)
        rows = rng.integers(segment.num_rows, size=count)
        deltas = rng.integers(-9, 10, (count, segment.width)).astype(np.float32)
        self.server.push(segment.keys(rows), deltas)
        np.add.at(self.model[segment.name], rows, deltas)

    @rule(segment=SEGMENTS, seed=SEEDS)
    def set(self, segment, seed) -> None:  # type: ignore[no-untyped-def]
        rng = np.random.default_rng(seed)
        rows = rng.permutation(segment.num_rows)[: rng.integers(segment.num_rows + 1)]
        values = rng.integers(-9, 10, (rows.size, segment.width)).astype(np.float32)
        self.server.set(segment.keys(rows), values)
        self.model[segment.name][rows] = values

    @rule(segment=SEGMENTS, seed=SEEDS, count=st.integers(0, 40))
    def pull(self, segment, seed, count) -> None:  # type: ignore[no-untyped-def]
        rows = np.random.default_rng(seed).integers(segment.num_rows, size=count)
        out = np.full((count, segment.width), np.nan, np.float32)
        self.server.pull(segment.keys(rows), out)
        np.testing.assert_array_equal(out, self.model[segment.name][rows])

    @rule(segment=SEGMENTS)
    def announce(self, segment) -> None:  # type: ignore[no-untyped-def]
        keys = segment.keys(np.arange(segment.num_rows))
        self.server.intent(keys, self.clock, self.clock + 1)
        self.server.localize(keys)
        self.server.quiesce()

    @rule()
    def advance(self) -> None:
        self.clock += 1
        assert self.server.advance_clock() == self.clock

    @rule(count=st.integers(1, 50))
    def prepare_sample(self, count: int) -> None:
        handle = self.server.prepare_sample(count, self.clock, self.clock + 1)
        assert handle not in self.handles
        self.handles[handle] = count

    @rule(data=st.data())
    def pull_sample(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from([*self.handles, -1]))
        count = self.handles.pop(handle, 1)
        keys, rows = np.empty(count, np.int64), np.empty((count, 3), np.float32)
        if handle == -1:
            with pytest.raises(ServerError, match="handle"):
                self.server.pull_sample(handle, keys, rows)
        else:
            self.server.pull_sample(handle, keys, rows)
            np.testing.assert_array_equal(rows, self.model["c"][keys - LAYOUT["c"].first_key])

    @invariant()
    def rows_are_the_model(self) -> None:
        for segment in LAYOUT.segments:
            out = np.empty((segment.num_rows, segment.width), np.float32)
            self.server.pull(segment.keys(np.arange(segment.num_rows)), out)
            np.testing.assert_array_equal(out, self.model[segment.name])

    def teardown(self) -> None:
        self.server.close()


AnyOrderOfCalls.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, derandomize=True)
TestAnyOrderOfCalls = AnyOrderOfCalls.TestCase


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sample_for_no_clocks_is_refused_in_every_scheme(scheme: str) -> None:
    sampler = Sampler(Distribution("uniform", 30), scheme, True, seed=1, worker=0)
    server = EmbeddedServer(solo(), LAYOUT, ("c", sampler))
    with pytest.raises(ServerError, match=r"start, end: \[2, 2\)"):
        server.prepare_sample(3, 2, 2)
    assert server.stats.intended_rows == 0


def test_nothing_to_sample_from() -> None:
    with pytest.raises(ServerError, match="no segment is set up for sampling"):
        EmbeddedServer(solo(), LAYOUT).prepare_sample(1, 0, 1)


def test_rows_that_do_not_fit_are_refused_before_they_are_touched() -> None:
    with pytest.raises(ConfigError, match=r"take 4000000\.00 GB of shared memory but .* has .* GB free") as caught:
        EmbeddedServer(solo(), Layout.of(("huge", 10**12, 1000)))
    assert caught.value.everywhere


def test_a_limit_on_the_size_of_files_is_named() -> None:
    """Shared memory is a file, so a batch system's ``ulimit -f`` can stop it; the error says so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"no file of 0\.\d\d GB for shared memory .* too large$") as caught:
            EmbeddedServer(solo(), Layout.of(("some", 100_000, 30)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.everywhere


def test_a_long_trace_is_not_read_when_it_is_continued(tmp_path: Path) -> None:
    old = [tmp_path / "rank-00000.tsv", tmp_path / "node-00000.tsv"]
    for path in old:
        with open(path, "wb") as file:
            file.truncate(1 << 42)  # holes: 4 TB that take no space
    server = TracedServer(solo(), LAYOUT, traced=np.array([3]))
    server.start_trace(tmp_path)
    server.push(np.array([3]), np.ones((1, 2), np.float32))
    server.close()
    for path, event in zip(old, ("push", "alloc"), strict=True):
        with open(path, "rb") as file:
            file.seek(1 << 42)
            cut_off, line, end = file.read().decode().split("\n")
        assert not cut_off and event in line and not end


def test_layout() -> None:
    assert (LAYOUT.num_keys, LAYOUT.num_bytes) == (38, 4 * (14 + 5 + 90))
    assert [segment.first_key for segment in LAYOUT.segments] == [0, 7, 8]
    assert LAYOUT.segment_of(8, 37) == LAYOUT["c"]
    assert LAYOUT.segment_of(7, 8) is None
    np.testing.assert_array_equal(LAYOUT["c"].keys(np.array([0, 29])), [8, 37])
