"""The distribution of samples. Seeds are fixed; a correct sampler fails a bound with the stated probability."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from lapse_elmo.ps.sampling import DISTRIBUTIONS, POOL_REUSE, SCHEMES, SHARING, Distribution, Sampler
from lapse_elmo.ps.sampling import _expected_tries as expected_tries

DEVIATIONS = 4.5  # of a standard normal: a correct sampler passes with probability 1 - 7e-6


def chi_square_is_plausible(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether Pearson's statistic is below its bound, in Wilson and Hilferty's normal approximation."""
    assert expected.min() > 5
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.size - 1
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return normal < DEVIATIONS


def sampler(
    scheme: str = "naive", replacement: bool = False, worker: int = 0, seed: int = 1, node: int = 0,
    sharing: str = "none",
) -> Sampler:
    return Sampler(Distribution("log-uniform", 50), scheme, replacement, seed, worker, node, sharing)


def inclusion(draws: list[np.ndarray], num_rows: int) -> np.ndarray:
    """Return how often each row is in a draw, as (num_rows,)."""
    return np.bincount(np.concatenate(draws), minlength=num_rows)


def brute_force(distribution: Distribution, rng: np.random.Generator, count: int) -> list[int]:
    """Return distinct rows in order of first appearance, one draw after another."""
    rows: dict[int, None] = {}
    while len(rows) < count:
        for row in rng.choice(distribution.num_rows, 200, p=distribution.probabilities).tolist():
            if len(rows) < count:
                rows[row] = None
    return list(rows)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("num_rows", [1, 2, 60])
def test_draws_follow_the_law(name: str, num_rows: int) -> None:
    distribution = Distribution(name, num_rows)
    counts = np.bincount(distribution.draw(np.random.default_rng(5), 100_000), minlength=num_rows)
    assert counts.size == num_rows
    expected = distribution.probabilities * 100_000
    assert num_rows == 1 or chi_square_is_plausible(counts, expected)


def test_the_check_itself_sees_a_wrong_law() -> None:
    draws = np.bincount(Distribution("log-uniform", 90).draw(np.random.default_rng(5), 100_000), minlength=90)[:60]
    assert not chi_square_is_plausible(draws, Distribution("log-uniform", 60).probabilities * 100_000)


@pytest.mark.parametrize("num_rows", [1, 7, 793_471])
def test_log_uniform_probabilities(num_rows: int) -> None:
    probabilities = Distribution("log-uniform", num_rows).probabilities
    assert probabilities.sum() == pytest.approx(1, abs=1e-9)
    k = num_rows // 2
    assert probabilities[k] == pytest.approx(math.log((k + 2) / (k + 1)) / math.log(num_rows + 1), rel=1e-9)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_of_a_large_table_stay_inside(name: str) -> None:
    rows = Distribution(name, 793_471).draw(np.random.default_rng(0), 200_000)
    assert rows.dtype == np.int64
    assert rows.min() >= 0
    assert rows.max() < 793_471


@pytest.mark.parametrize(("num_rows", "count"), [(200, 40), (40, 36), (40, 40)], ids=["by draws", "by a race", "all"])
def test_distinct_draws_include_rows_as_rejection_does(num_rows: int, count: int) -> None:
    """Both ways of drawing agree with one draw at a time and with the expected count 1 - (1 - P) ** tries."""
    distribution = Distribution("log-uniform", num_rows)
    by_race = expected_tries(distribution, count) > 2 * num_rows
    assert by_race == (num_rows == 40), "the case no longer takes the way that it is meant for"
    rng, repeats = np.random.default_rng(11), 3000
    draws = [distribution.draw_distinct(rng, count) for _ in range(repeats)]
    assert all(np.unique(draw).size == count for draw in draws)
    frequency = inclusion(draws, num_rows) / repeats
    slow = [brute_force(distribution, rng, count) for _ in range(600)]
    reference = inclusion([np.array(rows) for rows in slow], num_rows) / 600
    both = (frequency * repeats + reference * 600) / (repeats + 600)
    error = np.sqrt(both * (1 - both) * (1 / repeats + 1 / 600))
    assert (np.abs(frequency - reference) <= DEVIATIONS * error + 1 / 600).all()
    if count < num_rows:
        tries = expected_tries(distribution, count)
        formula = -np.expm1(tries * np.log1p(-distribution.probabilities))
        assert formula.sum() == pytest.approx(count, rel=1e-3)
        np.testing.assert_allclose(frequency, formula, atol=0.05)


@pytest.mark.parametrize(("num_rows", "count"), [(200, 40), (40, 36)], ids=["by draws", "by a race"])
def test_distinct_draws_come_in_order_of_appearance(num_rows: int, count: int) -> None:
    """The first row follows the distribution itself, so a prefix of a sample is distributed like a shorter sample."""
    distribution = Distribution("log-uniform", num_rows)
    rng = np.random.default_rng(3)
    first = np.bincount([distribution.draw_distinct(rng, count)[0] for _ in range(4000)], minlength=num_rows)
    cells = np.add.reduceat(first, np.arange(0, num_rows, 10))
    expected = np.add.reduceat(distribution.probabilities * 4000, np.arange(0, num_rows, 10))
    assert chi_square_is_plausible(cells, expected)


def test_uniform_distinct_draws() -> None:
    draws = [Distribution("uniform", 30).draw_distinct(np.random.default_rng(i), 10) for i in range(3000)]
    assert chi_square_is_plausible(inclusion(draws, 30), np.full(30, 1000.0))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("replacement", [False, True])
def test_a_sample_is_a_function_of_seed_worker_and_number(scheme: str, replacement: bool) -> None:
    def draw(number: int, seed: int = 1, worker: int = 0) -> bytes:
        return sampler(scheme, replacement, worker, seed).draw(number, 20).tobytes()

    assert [draw(n) for n in range(5)] == [draw(n) for n in reversed(range(5))][::-1]
    assert len({draw(n, seed, worker) for n in range(4) for seed in (1, 2) for worker in (0, 1, 2)}) == 24


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("sharing", SHARING)
def test_who_draws_alike(scheme: str, replacement: bool, sharing: str) -> None:
    """Workers 0 and 1 are on node 0, worker 2 on node 1; under ``local`` both nodes have the same local rows."""
    is_local = np.arange(50) % 3 > 0 if scheme == "local" else None
    numbers = range(2 * POOL_REUSE)
    first, second, away = (
        [sampler(scheme, replacement, worker, 1, node, sharing).draw(n, 20, is_local).tobytes() for n in numbers]
        for worker, node in ((0, 0), (1, 0), (2, 1))
    )
    assert len(set(first)) == len(numbers)
    assert (first == second) == (sharing != "none")
    assert (first == away) == (sharing == "job")
    assert first == second or not set(first) & set(second)
    assert first == away or not set(first) & set(away)


def test_workers_that_see_different_local_rows_draw_nearly_alike() -> None:
    """A row that arrives between two draws changes the draw of that row only."""
    is_local = np.arange(50) % 2 > 0
    now = is_local.copy()
    now[0] = True
    before, after = (set(sampler("local", sharing="node").draw(3, 10, rows).tolist()) for rows in (is_local, now))
    assert after - before == {0}
    assert len(before - after) == 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("sharing", SHARING)
def test_every_scheme_keeps_the_law_of_one_sample(scheme: str, replacement: bool, sharing: str) -> None:
    """Each scheme follows the law; so does ``local`` if all rows are local. Only different pools are independent."""
    drawn = [sampler(scheme, replacement, 1, 1, 1, sharing).draw(number * POOL_REUSE, 5) for number in range(3000)]
    if replacement:
        assert chi_square_is_plausible(inclusion(drawn, 50), Distribution("log-uniform", 50).probabilities * 15_000)
    else:
        assert all(np.unique(rows).size == 5 for rows in drawn)
        frequency = inclusion(drawn, 50) / 3000
        slow = np.random.default_rng(9)
        reference = inclusion([Distribution("log-uniform", 50).draw_distinct(slow, 5) for _ in range(3000)], 50) / 3000
        np.testing.assert_allclose(frequency, reference, atol=DEVIATIONS * math.sqrt(0.5 / 3000))


def test_a_pool_serves_shuffled_and_then_is_replaced() -> None:
    draws = [sampler("pool").draw(number, 20) for number in range(3 * POOL_REUSE)]
    pools = [draws[i : i + POOL_REUSE] for i in range(0, len(draws), POOL_REUSE)]
    for pool in pools:
        assert len({tuple(np.sort(rows)) for rows in pool}) == 1
        assert len({tuple(rows) for rows in pool}) == POOL_REUSE
    assert all(set(a[0]) != set(b[0]) for a, b in pairwise(pools))


def test_schemes_but_the_pool_draw_alike() -> None:
    """Schemes differ in when rows are drawn and moved, not in which: a run may change its scheme midway."""
    naive, preloc, local = (sampler(scheme).draw(4, 20) for scheme in ("naive", "preloc", "local"))
    np.testing.assert_array_equal(naive, preloc)
    np.testing.assert_array_equal(naive, local)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sharing", SHARING)
def test_a_worker_of_many_parts_draws_what_they_would(scheme: str, sharing: str) -> None:
    distribution = Distribution("log-uniform", 100)
    few = Sampler(distribution, scheme, False, 7, 1, 2, sharing, parts=3)
    for number in range(6):
        worker = 3 + number % 3
        own = Sampler(distribution, scheme, False, 7, worker, 2, sharing)
        np.testing.assert_array_equal(few.draw(number, 20), own.draw(number // 3, 20))
