"""The steps of a layer in C against the same kernels called from Python: equal bits; and when C takes them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lapse_elmo import native
from lapse_elmo.model import lstm_pass, lstm_steps, prepacked
from lapse_elmo.model.initial_values import initialize_lstm
from lapse_elmo.model.lstm import FusedElmoLstm
from lapse_elmo.model.lstm_steps import STEPS_SOURCE, Layer, NativeSteps, native_steps
from lapse_elmo.model.packing import Packing
from lapse_elmo.model.pointwise import pointwise
from lapse_elmo.model.products import Matmul
from tests.model.test_lstm import mask_of

SIZE, CELLS = 6, 10
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=9)


@pytest.fixture(params=["fp32", "bf16"], scope="module")
def precision(request: pytest.FixtureRequest) -> str:
    """Return a precision whose steps are computed by C on this machine."""
    storage = torch.bfloat16 if request.param == "bf16" else torch.float32
    if native.load(STEPS_SOURCE) is None or 1 not in prepacked.rows_prepacked(storage, strided=False):
        pytest.skip(native.problem(STEPS_SOURCE) or "this processor has no products of this precision in C")
    return request.param


def results(precision: str, lengths: list[int], dropout: float, clip: float, stateful: bool) -> dict[str, Tensor]:
    """Return the outputs and gradients of two batches in a row; the state may pass from the first to the second."""
    lstm = FusedElmoLstm(
        SIZE, SIZE, CELLS, 2, recurrent_dropout_probability=dropout, memory_cell_clip_value=clip,
        state_projection_clip_value=clip / 4, stateful=stateful, precision=precision,
    )
    initialize_lstm(lstm, "glorot", torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    packing = Packing.of_mask(mask_of(lengths, 9))
    found: dict[str, Tensor] = {}
    for batch in range(2):
        inputs = 3.0 * torch.randn(packing.num_tokens, SIZE, generator=generator)
        outputs = lstm.run(inputs.requires_grad_(), packing, generator)
        sum((output * output.detach().cos()).sum() for layer in outputs for output in layer).backward()  # type: ignore
        assert inputs.grad is not None
        found |= {f"output {batch} {n} {d}": layer[d].detach() for n, layer in enumerate(outputs) for d in (0, 1)}
        found[f"inputs {batch}"] = inputs.grad
    return found | {name: p.grad for name, p in lstm.named_parameters() if p.grad is not None}


def counted(patch: pytest.MonkeyPatch) -> list[str]:
    """Have the calls of C listed."""
    calls: list[str] = []
    for name in ("forward", "backward"):
        original = getattr(NativeSteps, name)

        def noted(self: NativeSteps, *arguments: Any, name: str = name, original: Any = original) -> None:
            calls.append(name)
            original(self, *arguments)

        patch.setattr(NativeSteps, name, noted)
    return calls


@settings(max_examples=25, deadline=None)
@given(
    lengths=LENGTHS, dropout=st.sampled_from([0.0, 0.3]), clip=st.sampled_from([3.0, 0.2, math.inf]),
    stateful=st.booleans(),
)
def test_equal_the_steps_from_python(
    precision: str, lengths: list[int], dropout: float, clip: float, stateful: bool
) -> None:
    options = precision, lengths, dropout, clip, stateful
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        in_c = results(*options)
        assert calls.count("forward") == calls.count("backward") == 8, "batches, layers and directions"
        patch.setattr(lstm_pass, "native_steps", lambda *_: None)
        from_python = results(*options)
        assert len(calls) == 16
    assert in_c.keys() == from_python.keys()
    for name, value in in_c.items():
        assert torch.equal(value, from_python[name]), name


def test_a_profile_sees_the_products(precision: str) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results(precision, [3, 2], 0.0, 3.0, False)
    [products] = [event for event in profile.key_averages() if event.key == prepacked.PREPACKED_MATMUL]
    # Two batches of two layers and directions: of three steps, all but the first (last) have two products.
    assert products.count == 2 * 4 * (5 + 5)


def test_a_wrong_tensor_is_refused(precision: str) -> None:
    """Shapes, dtypes and contiguity are asserted before a pointer reaches C."""
    matmul = Matmul(torch.bfloat16 if precision == "bf16" else torch.float32)
    recurrent, projection = matmul.prepare(torch.ones(SIZE, 4 * CELLS)), matmul.prepare(torch.ones(CELLS, SIZE))

    def run(sizes: list[int], **others: Tensor) -> None:
        stored = {"gates": 4 * CELLS, "hidden": SIZE, "cell_output": CELLS}
        tensors = {name: torch.zeros(5, width, dtype=matmul.storage) for name, width in stored.items()}
        tensors |= {"bias": torch.zeros(4 * CELLS), "cells": torch.zeros(5, CELLS)} | others
        steps = native_steps(pointwise(tensors["gates"]), recurrent, projection)
        assert steps is not None
        steps.forward(Layer(sizes, None, None, 3.0, 3.0), initial_hidden=None, **tensors)

    run([3, 2])
    for sizes in ([3, 1], [2, 3], [3, 3]):
        with pytest.raises(AssertionError):
            run(sizes)
    short, strided = torch.zeros(4, CELLS), torch.zeros(CELLS, 5).t()
    for wrong in ({"cells": short}, {"cells": strided}, {"cells": torch.zeros(5, CELLS, dtype=torch.float64)},
                  {"cell_output": torch.zeros(2, CELLS, dtype=matmul.storage)}, {"bias": torch.zeros(CELLS)}):
        with pytest.raises(AssertionError):
            run([3, 2], **wrong)


def test_python_calls_kernels_where_one_is_not_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Matmul(torch.float32).prepare(torch.ones(4, 4))
    doubles = Matmul(torch.float64).prepare(torch.ones(4, 4, dtype=torch.float64))
    assert native_steps(pointwise(torch.empty(0, dtype=torch.float64)), doubles, doubles) is None
    monkeypatch.setenv(native.SWITCH, "0")
    assert lstm_steps.native_steps(pointwise(torch.empty(0)), weight, weight) is None
