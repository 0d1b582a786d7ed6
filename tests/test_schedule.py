"""The learning rate by tokens: each law against its formula, and every edge between them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapse_elmo.config.training import Config, OptimizerConfig
from lapse_elmo.schedule import Schedule

RUN, STEP = 1_000_000.0, 800.0


def rate(tokens: float, **options: object) -> float:
    return Schedule(Config(optimizer=OptimizerConfig(learning_rate=0.4, **options)), RUN).rate(tokens, STEP)  # type: ignore[arg-type]


def test_without_options_it_is_constant() -> None:
    assert {rate(tokens) for tokens in (0, 5e5, RUN, 2 * RUN)} == {0.4}


def test_warm_up_rises_from_the_first_step_to_the_full_rate() -> None:
    assert rate(0, warmup_tokens=8000) == pytest.approx(0.04)
    assert rate(800, warmup_tokens=8000) == pytest.approx(0.08)
    assert rate(7200, warmup_tokens=8000) == rate(8000, warmup_tokens=8000) == pytest.approx(0.4)


@pytest.mark.parametrize(("tokens", "left"), [(0, 1.0), (2.5e5, 0.75), (5e5, 0.5), (1e6, 0.0), (3e6, 0.0)])
def test_linear_and_cosine_end_with_the_run(tokens: float, left: float) -> None:
    assert rate(tokens, schedule="linear") == pytest.approx(0.4 * left)
    assert rate(tokens, schedule="cosine") == pytest.approx(0.4 * (1 + math.cos(math.pi * (1 - left))) / 2)
    assert rate(tokens, schedule="linear", final_rate=0.5) == pytest.approx(0.4 * (0.5 + 0.5 * left))


def test_the_fall_starts_where_the_warm_up_ends() -> None:
    options = {"schedule": "linear", "warmup_tokens": 200_000}
    assert rate(200_000, **options) == pytest.approx(0.4)
    assert rate(600_000, **options) == pytest.approx(0.2)
    assert rate(300_000, **options, decay_tokens=100_000) == 0


def test_inverse_square_root() -> None:
    assert rate(0, schedule="inverse-sqrt", decay_tokens=1000) == pytest.approx(0.4)
    assert rate(3000, schedule="inverse-sqrt", decay_tokens=1000) == pytest.approx(0.2)
    assert rate(4000, schedule="inverse-sqrt", warmup_tokens=1000) == pytest.approx(0.2)
    assert rate(1e9, schedule="inverse-sqrt", decay_tokens=1000, final_rate=0.1) == pytest.approx(0.04)


@given(
    st.sampled_from(["constant", "linear", "cosine", "inverse-sqrt"]), st.integers(1, 2_000_000),
    st.floats(0, 3e6), st.floats(1, 1e5),
)
def test_it_never_leaves_its_bounds(schedule: str, warmup: int, tokens: float, step: float) -> None:
    """The rate stays between 0 and its maximum and never rises after the warm-up, even if the run is shorter."""
    law = Schedule(Config(optimizer=OptimizerConfig(learning_rate=0.4, schedule=schedule, warmup_tokens=warmup)), RUN)
    assert 0 <= law.rate(tokens, step) <= 0.4
    if tokens >= warmup:
        assert law.rate(tokens + step, step) <= law.rate(tokens, step)


def test_adams_rate_falls_where_the_batch_cannot_grow() -> None:
    def law(**options: object) -> Schedule:
        optimizer = OptimizerConfig(learning_rate=0.4, dense_rate=0.008, **options)  # type: ignore[arg-type]
        return Schedule(Config(optimizer=optimizer), RUN)

    adam = law(schedule="linear")
    assert adam.rates(RUN / 2, STEP, 1.0) == pytest.approx((0.2, 0.004))
    assert adam.rates(RUN / 2, STEP, 0.25) == pytest.approx((0.2, 0.002))
    adagrad = law(dense_optimizer="adagrad")
    assert adagrad.rates(0.0, STEP, 0.25) == pytest.approx((0.4, 0.008))
