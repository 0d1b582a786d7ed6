"""Rows in shared memory: every function of rows.c against its fallback, and update rules against torch's optimizers."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapse_elmo import native
from lapse_elmo.mpi.node_memory import NodeMemory
from lapse_elmo.mpi.world import solo
from lapse_elmo.ps.layout import Layout, Segment, by_occurrence
from lapse_elmo.ps.locked_rows import LockedRows
from lapse_elmo.ps.rows import COPY, MAIN, SOURCE, NativeRows, Rows, _address, array_shapes
from lapse_elmo.ps.rules import Rule

ROWS = 60
WIDTHS = (1, 2, 7, 16, 129, 1027)
RULES: dict[str, Rule | None] = {
    "none": None, "sgd": Rule("sgd"), "adagrad": Rule("adagrad", epsilon=1e-3), "per row": Rule("adagrad", per_row=True)
}
MAINS, COPIES, ABSENT = np.arange(0, 25), np.arange(25, 50), np.arange(50, 60)
RATE = 0.2


def equal(two: Iterable[np.ndarray]) -> None:
    first, second = two
    np.testing.assert_array_equal(first, second)


@dataclass
class Pair:
    """The same rows in both versions: main copies of MAINS, replicas of COPIES; the others are absent."""

    segment: Segment
    both: tuple[Rows, Rows]
    rng: np.random.Generator

    def some(self, rows: np.ndarray, number: int) -> np.ndarray:
        """Return ``number`` of ``rows`` in random order, with repeats."""
        return self.rng.choice(rows, number)

    def values(self, number: int, width: int) -> np.ndarray:
        return self.rng.normal(size=(number, width)).astype(np.float32)

    def same(self) -> None:
        """Check that both versions hold the same, up to the last bits."""
        a, b = self.both
        np.testing.assert_array_equal(a.flags & 15, b.flags & 15)
        np.testing.assert_array_equal(a.slots, b.slots)
        np.testing.assert_allclose(a.main, b.main, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(a.replica, b.replica, rtol=2e-6, atol=1e-6)


@contextmanager
def opened(rule: str, width: int) -> Iterator[Pair]:
    library = native.load(SOURCE)
    assert library is not None, native.problem(SOURCE)
    segment = Layout.of(("before", 3, 2), ("rows", ROWS, width, RULES[rule]))["rows"]
    memories = [NodeMemory(solo(), array_shapes(segment, True)) for _ in range(2)]
    pair = Pair(
        segment, (NativeRows(memories[0], segment, library), LockedRows(memories[1], segment)), np.random.default_rng(1)
    )
    values = abs(pair.values(ROWS, segment.row_width))  # Adagrad's accumulators are not negative
    for rows in pair.both:
        rows.put(MAINS, MAINS[::-1].copy(), values[MAINS], as_replica=False)
        rows.put(COPIES, COPIES - COPIES[0], values[COPIES], as_replica=True)
    yield pair
    for rows, memory in zip(pair.both, memories, strict=True):
        rows.close()
        memory.close()


@pytest.fixture(params=[(name, width) for name in RULES for width in WIDTHS], ids=str)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with opened(*request.param) as pair:
        yield pair


@given(
    rule=st.sampled_from(sorted(RULES)), width=st.one_of(st.integers(1, 70), st.integers(200, 300)), data=st.data(),
    rows=st.lists(st.integers(0, ROWS - 1), max_size=40).map(lambda rows: np.array(rows, np.int64)),
)
def test_any_width_and_rows(rule: str, width: int, data: st.DataObject, rows: np.ndarray) -> None:
    """Tails of every width, in any order of rows and with repeats; nothing behind the last row is written."""
    with opened(rule, width) as pair:
        used = data.draw(st.integers(1, pair.segment.row_width))
        gradients, deltas = pair.values(rows.size, width), abs(pair.values(rows.size, pair.segment.row_width))
        outs = [np.full((rows.size + 1, used), 7, np.float32) for _ in pair.both]
        for call in (
            lambda some, out: some.push(rows, gradients, RATE), lambda some, out: some.add(rows, deltas),
            lambda some, out: some.pull(rows, out[:-1]),
        ):
            equal(call(some, out) for some, out in zip(pair.both, outs, strict=True))
        pair.same()
        np.testing.assert_allclose(outs[0], outs[1], rtol=2e-6, atol=1e-6)
        assert all((out[-1] == 7).all() for out in outs)


@pytest.mark.parametrize("pair", [("adagrad", 7)], indirect=True)
def test_wrong_arrays_do_not_reach_c(pair: Pair) -> None:
    """In place of rows, values and slots: arrays of another dtype, another size, or with gaps."""
    some, width = pair.both[0], pair.segment.row_width
    rows, slots, values = MAINS[:4], MAINS[-4:], np.ones((4, width), np.float32)
    replicas = COPIES[:4]
    calls: list[tuple[Callable, list[np.ndarray]]] = [
        (some.pull, [rows, values]), (some.push, [rows, values[:, :7].copy()]), (some.add, [rows, values]),
        (some.set, [rows, values]), (some.put, [ABSENT[:4], slots, values]), (some.take, [rows, values]),
        (some.promote, [replicas, slots, values]), (some.refresh, [replicas, values]),
        (some.overwrite, [replicas, values]), (some.clear_dirty, [rows]), (some.release, [replicas]),
        (some.all_owned, [rows]),
    ]
    before = some.entries.copy(), some.main.copy(), some.replica.copy()
    for call, arrays in calls:
        rest = (False,) if call == some.put else ()
        for place, array in enumerate(arrays):
            bad = [array.astype(np.int32 if array.ndim == 1 else np.float64), np.repeat(array, 2, axis=0)[::2]]
            if len(arrays) > 1:
                bad.append(array[:-1])
            if array.ndim == 2:
                bad += [np.concatenate([array, array], 1), np.asfortranarray(array), array.reshape(-1)]
            for other in bad:
                with pytest.raises(AssertionError):
                    call(*arrays[:place], other, *arrays[place + 1 :], *rest)
    for old, new in zip(before, (some.entries, some.main, some.replica), strict=True):
        np.testing.assert_array_equal(old, new)


def test_pull(pair: Pair) -> None:
    for width in (pair.segment.width, pair.segment.row_width):
        for rows in (pair.some(np.arange(ROWS), 200), np.arange(50), MAINS, pair.some(MAINS, 40), ABSENT):
            outs = [np.full((rows.size, width), 7, np.float32) for _ in pair.both]
            missing = [some.pull(rows, out) for some, out in zip(pair.both, outs, strict=True)]
            np.testing.assert_array_equal(missing[0], np.flatnonzero(rows >= 50))
            equal(missing)
            equal(outs)
            whole = np.empty((rows.size, pair.segment.row_width), np.float32)
            pair.both[0].pull(rows, whole)
            here = rows < 50
            np.testing.assert_array_equal(outs[0][here], whole[here, :width])
            assert (outs[0][~here] == 7).all()


@pytest.mark.parametrize("mark", [True, False])
def test_push(pair: Pair, mark: bool) -> None:
    """Push in any order, with repeats, to main copies, replicas and absent rows."""
    for rows in (pair.some(np.arange(ROWS), 150), MAINS, pair.some(COPIES, 30), pair.some(ABSENT, 3), np.full(9, 30)):
        values = pair.values(rows.size, pair.segment.width)
        missing = [some.push(rows, values, RATE, mark) for some in pair.both]
        np.testing.assert_array_equal(missing[0], np.flatnonzero(rows >= 50))
        equal(missing)
        pair.same()
    dirty = pair.both[0].flags & 8 != 0
    assert dirty[MAINS].all() == mark and dirty[MAINS].any() == mark and dirty[30]


def test_a_push_is_a_step_of_the_rule(pair: Pair) -> None:
    """A push takes the steps of torch's optimizers, repeats one after another; a replica's deltas are its changes."""
    rule, width = pair.segment.rule, pair.segment.width
    rows = pair.some(np.arange(50), 90)
    gradients = pair.values(rows.size, width)
    before = np.empty((50, pair.segment.row_width), np.float32)
    pair.both[0].pull(np.arange(50), before)
    expected = torch.from_numpy(before.astype(np.float64))
    for row, gradient in zip(rows.tolist(), torch.from_numpy(gradients.astype(np.float64)), strict=True):
        if rule is None:
            expected[row] += gradient
        elif rule.kind == "sgd":
            expected[row] -= RATE * gradient
        else:
            square = gradient.square()
            expected[row, width:] += square.mean() if rule.per_row else square
            expected[row, :width] -= RATE * gradient / (expected[row, width:].sqrt() + rule.epsilon)
    for some in pair.both:
        some.push(rows, gradients, RATE)
        after = np.empty_like(before)
        some.pull(np.arange(50), after)
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-5)
        which, deltas = some.collect(COPIES)
        np.testing.assert_allclose(deltas, (after - before)[COPIES[which]], rtol=1e-4, atol=1e-5)


def test_add(pair: Pair) -> None:
    """``add`` adds to whole rows under any rule."""
    rows = pair.some(np.arange(ROWS), 70)
    deltas = abs(pair.values(rows.size, pair.segment.row_width))
    missing = [some.add(rows, deltas, mark=False) for some in pair.both]
    equal(missing)
    pair.same()
    assert not (pair.both[0].flags[MAINS] & 8).any()


def test_the_way_of_rows(pair: Pair) -> None:
    """Rows are set, cleaned, collected, refreshed, overwritten, released and taken as whole rows."""
    wide = pair.segment.row_width
    every = pair.rng.permutation(ROWS)
    values = abs(pair.values(ROWS, wide))
    equal(some.set(every, values) for some in pair.both)
    pair.same()
    equal(some.clear_dirty(MAINS) for some in pair.both)
    rows = pair.some(COPIES, 12)
    gradients = pair.values(rows.size, pair.segment.width)
    for some in pair.both:
        some.push(rows, gradients, RATE)
    (which, deltas), (others, more) = (some.collect(COPIES) for some in pair.both)
    np.testing.assert_array_equal(which, others)
    np.testing.assert_allclose(deltas, more, rtol=2e-6, atol=1e-6)
    assert deltas.shape == (np.unique(rows).size, wide)
    for some in pair.both:
        some.push(rows[:5], gradients[:5], RATE)
        some.refresh(COPIES, values[COPIES])
    pair.same()
    for some in pair.both:
        some.overwrite(COPIES[:3], values[:3])
    pair.same()
    for some in pair.both:
        some.promote(COPIES[-4:], np.arange(50, 54), values[:4])
    pair.same()
    equal(some.release(COPIES[:-4]) for some in pair.both)
    outs = [np.empty((MAINS.size, wide), np.float32) for _ in pair.both]
    for some, out in zip(pair.both, outs, strict=True):
        some.take(MAINS, out)
    equal(outs)
    pair.same()
    kinds = pair.both[0].kinds()
    np.testing.assert_array_equal(np.flatnonzero(kinds == MAIN), COPIES[-4:])  # the promoted rows
    assert (kinds == COPY).any()


def test_accumulators_are_exact_sums_of_squares() -> None:
    """With integer gradients in any order, accumulators are the exact sums of squares."""
    for per_row in (False, True):
        rule = Rule("adagrad", per_row)
        rows = torch.full((2, 5), 1.0)
        rows = torch.cat([rows, torch.full((2, rule.state_width(5)), 3.0)], 1)
        for g in (1.0, -2.0, 4.0):
            rows += rule.changes(rows, torch.full((2, 5), g), 0.5)
        assert (rows[:, 5:] == 3 + 1 + 4 + 16).all()


def test_turns() -> None:
    rows = np.array([5, 3, 5, 5, 9, 3])
    assert [turn.tolist() for turn in by_occurrence(rows)] == [[0, 1, 4], [2, 5], [3]]
    assert list(by_occurrence(rows[:0])) == []


def test_addresses() -> None:
    """Of contiguous arrays, also empty and read-only ones; others are refused before C gets them."""
    for shape in ((7,), (0,), (0, 4), (3, 5)):
        array = np.zeros(shape, np.float32)
        assert _address(array) == array.ctypes.data
        array.flags.writeable = False
        assert _address(array) == array.ctypes.data
    strided = np.zeros((4, 6))[:, ::2]
    for writeable in (True, False):
        strided.flags.writeable = writeable
        with pytest.raises(AssertionError, match="48, 16"):
            _address(strided)


def test_locks_by_a_python_that_was_built_for_an_old_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of uv, which runs on new systems, too."""
    monkeypatch.delattr(fcntl, "F_OFD_SETLKW")
    segment = Layout.of(("rows", ROWS, 2, None))["rows"]
    memory = NodeMemory(solo(), array_shapes(segment, False))
    rows, values = LockedRows(memory, segment), np.ones((ROWS, 2), np.float32)
    rows.put(np.arange(ROWS), np.arange(ROWS), values, as_replica=False)
    pulled = np.zeros_like(values)
    rows.pull(np.arange(ROWS), pulled)
    np.testing.assert_array_equal(pulled, values)
    rows.close()
    memory.close()
