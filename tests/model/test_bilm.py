"""The biLM: both LSTMs agree, directions see what they may, dropout and initial values are reproducible."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lapse_elmo.errors import ConfigError
from lapse_elmo.model import reference
from lapse_elmo.model.bilm import BiLM, BiLMOptions, ScalarMix
from tests.model.padded import layers_of, outputs_of

SMALL = BiLMOptions(projection_size=5, cell_size=7, num_layers=2, dropout=0.0)
LENGTHS = torch.tensor([4, 7, 1, 0, 6])
MASK = torch.arange(8)[None, :] < LENGTHS[:, None]


def model(options: BiLMOptions = SMALL, seed: int = 3) -> BiLM:
    return BiLM(options, torch.Generator().manual_seed(seed)).double()


def embedded(*shape: int) -> Tensor:
    shape = shape or (*MASK.shape, 5)
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def result(bilm: BiLM, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Return both outputs, and the gradients of a fixed function of them."""
    inputs = embedded().requires_grad_()
    both = torch.stack(outputs_of(bilm, inputs, MASK, torch.Generator().manual_seed(seed)))
    bilm.zero_grad()
    (both * torch.linspace(-1.0, 1.0, both.numel(), dtype=both.dtype).view_as(both)).sum().backward()
    grads = {name: p.grad for name, p in bilm.named_parameters() if p.grad is not None}
    assert inputs.grad is not None and len(grads) == len(list(bilm.parameters()))
    return both.detach(), {**grads, "inputs": inputs.grad}


@pytest.mark.parametrize("context", ["top", "mix"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_equals_allennlp(context: str, dropout: float) -> None:
    options = replace(SMALL, context=context, dropout=dropout)
    found, expected = (result(model(replace(options, lstm=lstm))) for lstm in ("fused", "allennlp"))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    models = [model(replace(options, lstm=lstm)).eval() for lstm in ("fused", "allennlp")]
    layers = [layers_of(model, embedded(), MASK) for model in models]
    torch.testing.assert_close(*layers, rtol=1e-10, atol=1e-10)


def test_padding_and_its_width_change_nothing() -> None:
    bilm = model(replace(SMALL, dropout=0.3, recurrent_dropout=0.2))
    draws = []
    for width in (7, 12):
        inputs = torch.zeros(5, width, 5, dtype=torch.float64)
        inputs[:, :7] = embedded()[:, :7]
        inputs[:, 7:] = math.nan
        mask = torch.arange(width)[None, :] < LENGTHS[:, None]
        draws.append(outputs_of(bilm, inputs, mask, torch.Generator().manual_seed(1)))
    for narrow, wide in zip(*draws, strict=True):
        assert torch.equal(narrow, wide[:, :7]) and not wide[:, 7:].any()
        assert not narrow[3].any()


@pytest.mark.parametrize("context", ["top", "mix"])
def test_directions_see_only_what_they_may(context: str) -> None:
    bilm = model(replace(SMALL, context=context)).eval()
    inputs = embedded()
    changed = inputs.clone()
    changed[1, 3] += 1.0
    both = zip(outputs_of(bilm, changed, MASK), outputs_of(bilm, inputs, MASK), strict=True)
    differs = [(new - old).abs().sum(2) > 0 for new, old in both]
    # Forward at t has read up to t, to predict t + 1; backward at t has read down to t, to predict t - 1.
    assert differs[0][1].tolist() == [False] * 3 + [True] * 4 + [False]
    assert differs[1][1].tolist() == [True] * 4 + [False] * 4
    assert not differs[0][[0, 2, 3, 4]].any() and not differs[1][[0, 2, 3, 4]].any()


@pytest.mark.parametrize("lstm", ["fused", "allennlp"])
def test_dropout_is_reproducible_and_off_in_evaluation(lstm: str) -> None:
    bilm = model(replace(SMALL, dropout=0.2, recurrent_dropout=0.3, lstm=lstm))
    before = torch.random.get_rng_state()
    first, again, other = (result(bilm, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state()), "a given generator leaves torch's own alone"
    torch.manual_seed(4)
    seeded = outputs_of(bilm, embedded(), MASK)
    torch.manual_seed(4)
    torch.testing.assert_close(seeded, outputs_of(bilm, embedded(), MASK), rtol=0, atol=0)
    bilm.eval()
    assert torch.equal(result(bilm, 1)[0], result(bilm, 2)[0])


@pytest.mark.parametrize("lstm", ["fused", "allennlp"])
def test_state_passes_only_where_asked_and_never_between_modes(lstm: str) -> None:
    for stateful in (False, True):
        bilm = model(replace(SMALL, lstm=lstm, stateful=stateful))
        fresh = outputs_of(bilm, embedded(), MASK)[0]
        assert torch.equal(fresh, outputs_of(bilm, embedded(), MASK)[0]) is not stateful
        bilm.eval()
        assert torch.equal(fresh, outputs_of(bilm, embedded(), MASK)[0])
        bilm.train()
        assert torch.equal(fresh, outputs_of(bilm, embedded(), MASK)[0])


def test_layers_are_embedding_then_lstm() -> None:
    bilm = model().eval()
    layers = layers_of(bilm, embedded(), MASK)
    assert layers.shape == (3, *MASK.shape, 10)
    assert torch.equal(layers[0], torch.cat([embedded()] * 2, 2) * MASK[:, :, None])
    assert torch.equal(layers[2], torch.cat(outputs_of(bilm, embedded(), MASK), 2))
    with pytest.raises(AssertionError, match="eval"):
        layers_of(bilm.train(), embedded(), MASK)


@pytest.mark.parametrize("lstm", ["fused", "allennlp"])
def test_no_tokens(lstm: str) -> None:
    bilm = model(replace(SMALL, lstm=lstm, context="mix"))
    for output in outputs_of(bilm, embedded(2, 3, 5), torch.zeros(2, 3, dtype=torch.bool)):
        assert output.shape == (2, 3, 5) and not output.any()


def test_scalar_mix_equals_allennlps() -> None:
    ours: Any = ScalarMix(3).double()
    theirs = reference.modules("scalar_mix").ScalarMix(3, initial_scalar_parameters=[0.5, -1.0, 2.0]).double()
    with torch.no_grad():
        ours.scalars.copy_(torch.tensor([0.5, -1.0, 2.0]))
        for gamma in (ours.gamma, theirs.gamma):
            gamma.fill_(1.7)
    tensors = [embedded(4, 5) * factor for factor in (1.0, 2.0, -0.5)]
    outputs = ours(tensors), theirs(tensors)
    for output in outputs:
        (output**2).sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    expected = torch.cat([parameter.grad for parameter in theirs.scalar_parameters])
    torch.testing.assert_close(ours.scalars.grad, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.gamma.grad, theirs.gamma.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scheme", ["glorot", "orthogonal"])
def test_initial_values(scheme: str) -> None:
    options = BiLMOptions(projection_size=32, cell_size=64, lstm_init=scheme)
    before = torch.random.get_rng_state()
    same = [BiLM(replace(options, lstm=lstm), torch.Generator().manual_seed(2)) for lstm in ("fused", "allennlp")]
    assert torch.equal(before, torch.random.get_rng_state())
    other = BiLM(options, torch.Generator().manual_seed(3))
    for (name, value), second, third in zip(
        same[0].named_parameters(), same[1].parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(value, second), name
        if value.dim() == 1:
            assert torch.equal(value, (torch.arange(256) // 64 == 1).float())
        else:
            assert not torch.equal(value, third)
            check_values(scheme, name, value.detach())


def check_values(scheme: str, name: str, value: Tensor) -> None:
    projection = "projection" in name
    if scheme == "orthogonal" and not projection:
        for gate in value.chunk(4):
            torch.testing.assert_close(gate.t() @ gate, torch.eye(32), rtol=0, atol=1e-5)
        return
    limits = {"glorot": (math.sqrt(6 / (32 + 32 + 256)), math.sqrt(6 / (64 + 32))), "orthogonal": (0.0, 1 / 8)}
    limit = limits[scheme][projection]
    assert value.abs().max() <= limit
    assert abs(float(value.std()) - limit / math.sqrt(3)) < 0.05 * limit


@pytest.mark.parametrize(
    ("field", "value"),
    [("cell_size", 0), ("num_layers", 0), ("dropout", 1.0), ("recurrent_dropout", -0.1), ("cell_clip", -1.0),
     ("projection_clip", math.nan), ("context", "both"), ("lstm", "cudnn"), ("lstm_init", "zero")],
)
def test_refuses_bad_options(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(SMALL, **{field: value})
