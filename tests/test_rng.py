"""Random streams: keyed by what they are for, and nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lapse_elmo.rng import stream, torch_stream

KEYS: list[tuple[int, str, tuple[int, ...]]] = [
    (1, "a", ()), (2, "a", ()), (1, "b", ()), (1, "a", (0,)), (1, "a", (1,)), (1, "a", (1, 0)), (1, "a", (0, 1)),
    (1, "a", (2**32 - 1,)), (2**40 + 1, "a", ()),
]


def numpy_draw(seed: int, purpose: str, *indices: int) -> bytes:
    return stream(seed, purpose, *indices).integers(2**63, size=4).tobytes()


def torch_draw(seed: int, purpose: str, *indices: int) -> bytes:
    return torch.randint(2**62, (4,), generator=torch_stream(seed, purpose, *indices)).numpy().tobytes()


@pytest.mark.parametrize("draw", [numpy_draw, torch_draw])
def test_a_key_gives_its_stream(draw) -> None:  # type: ignore[no-untyped-def]
    first = [draw(seed, purpose, *indices) for seed, purpose, indices in KEYS]
    np.random.default_rng().random()
    torch.rand(3)
    assert [draw(seed, purpose, *indices) for seed, purpose, indices in KEYS] == first
    assert all(a != b for a, b in itertools.combinations(first, 2))


@pytest.mark.parametrize("index", [-1, 2**32])
def test_indices_that_could_be_mistaken_are_refused(index: int) -> None:
    """An index of 2**32 or more is refused, since NumPy would split it into two words, like two indices."""
    with pytest.raises(AssertionError):
        stream(1, "a", index)


def test_streams_do_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    torch_draw(1, "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_stay_what_they_were() -> None:
    """Another value here would change what a resumed run draws."""
    assert stream(1, "sample", 0, 5).integers(1000, size=5).tolist() == [200, 604, 946, 779, 128]
