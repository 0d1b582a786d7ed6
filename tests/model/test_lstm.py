"""The fused LSTM against AllenNLP's ElmoLstm, in float64: values, all gradients, dropout masks and carried state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lapse_elmo.model import reference
from lapse_elmo.model.initial_values import initialize_lstm
from lapse_elmo.model.lstm import FusedElmoLstm
from lapse_elmo.model.packing import Packing
from tests.mpi import mpirun

TOLERANCE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
LONG = [1, 200, 2, 57, 3, 120, 17, 199, 31]


def test_the_constructor_draws_nothing_and_loads_nothing() -> None:
    """The parameters are 0 but for the forget gate's bias; sympy would cost every rank 37 MB and a quarter second."""
    code = (
        "import sys, torch; from lapse_elmo.model.lstm import FusedElmoLstm; before = torch.random.get_rng_state();"
        "sizes = [int((p != 0).sum()) for p in FusedElmoLstm(3, 4, 5, 1).parameters()];"
        "print(sizes, bool((torch.random.get_rng_state() == before).all()), 'sympy' in sys.modules)"
    )
    job = mpirun(1, ["-c", code], fork=False)  # the fork server has imported it
    assert job.stdout == "[0, 0, 5, 0, 0, 0, 5, 0] True False\n"


def mask_of(lengths: Sequence[int], num_positions: int | None = None) -> Tensor:
    return torch.arange(num_positions or max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def pair(scale: float = 1.0, layers: int = 2, clip: float | None = 3.0, dropout: float = 0.0, stateful: bool = False,
         input_size: int = 5) -> tuple[FusedElmoLstm, Any]:
    """A fused and a reference LSTM with the same parameters, the usual ones times ``scale``."""
    sizes = (input_size, 5, 7, layers)
    options: dict[str, Any] = {
        "recurrent_dropout_probability": dropout,
        "memory_cell_clip_value": clip,
        "state_projection_clip_value": clip,
    }
    theirs = reference.elmo_lstm()(*sizes, **options).double()
    initialize_lstm(theirs, "glorot", torch.Generator().manual_seed(5))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(scale)
    ours = FusedElmoLstm(*sizes, **options, stateful=stateful).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def random(*shape: int, seed: int = 1, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(lstm: nn.Module, inputs: Tensor, mask: Tensor, upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = inputs.clone().requires_grad_()
    lstm.zero_grad()
    output = lstm(inputs, mask)
    output.backward(upstream)
    assert inputs.grad is not None
    found = {name: parameter.grad.clone() for name, parameter in lstm.named_parameters() if parameter.grad is not None}
    return output.detach(), {**found, "inputs": inputs.grad}


def assert_equal_with_gradients(ours: nn.Module, theirs: nn.Module, inputs: Tensor, mask: Tensor) -> Tensor:
    upstream = random(ours.num_layers, *mask.shape, 10, seed=2)  # type: ignore[arg-type]
    output, grads = gradients(ours, inputs, mask, upstream)
    expected, expected_grads = gradients(theirs, inputs, mask, upstream)
    torch.testing.assert_close(output, expected, **TOLERANCE)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], **TOLERANCE, msg=lambda text: f"{name}: {text}")  # noqa: B023
    return output


def test_parameters_are_named_and_shaped_as_allennlps() -> None:
    ours, theirs = pair(input_size=4)
    mine = {name: value.shape for name, value in ours.state_dict().items()}
    assert mine == {name: value.shape for name, value in theirs.state_dict().items()}


@pytest.mark.parametrize("lengths", [LONG, [1], [6], [4, 4, 4], [1, 1], [3, 0, 5]], ids=str)
def test_equals_allennlp_for_lengths(lengths: list[int]) -> None:
    ours, theirs = pair()
    mask = mask_of(lengths)
    assert_equal_with_gradients(ours, theirs, random(*mask.shape, 5), mask)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("input_size", [3, 5])
def test_equals_allennlp_for_depths_and_input_sizes(layers: int, input_size: int) -> None:
    ours, theirs = pair(layers=layers, input_size=input_size)
    mask = mask_of([2, 7, 5], num_positions=9)  # two positions that no sentence reaches
    assert_equal_with_gradients(ours, theirs, random(*mask.shape, input_size), mask)


@pytest.mark.parametrize("clip", [None, 0.0, 0.2, 3.0])
def test_equals_allennlp_with_clipping(clip: float | None) -> None:
    ours, theirs = pair(scale=3.0, clip=clip)
    mask = mask_of([9, 3, 12, 1])
    output = assert_equal_with_gradients(ours, theirs, random(*mask.shape, 5, scale=3.0), mask)
    if clip == 0.2:
        assert (output[0].abs() == 0.2).double().mean() > 0.1, "the clip is meant to act here"


@pytest.mark.parametrize("clip", [3.0, 0.2])
def test_equals_allennlp_with_given_dropout_masks(monkeypatch: pytest.MonkeyPatch, clip: float) -> None:
    ours, theirs = pair(scale=2.0, clip=clip, dropout=0.4)
    lengths = [4, 9, 1, 6]  # distinct, for AllenNLP's sort is not stable
    longest_first = torch.tensor(lengths).argsort(descending=True)
    masks = [(random(4, 5, seed=seed) > -0.3).double() / 0.6 for seed in range(10, 14)]
    mine, other = iter(masks), iter(masks)
    monkeypatch.setattr(ours, "_dropout_mask", lambda *_: next(mine))
    cell_globals = type(theirs.forward_layer_0).forward.__globals__
    monkeypatch.setitem(cell_globals, "get_dropout_mask", lambda *_: next(other)[longest_first])
    mask = mask_of(lengths)
    assert_equal_with_gradients(ours, theirs, random(*mask.shape, 5, scale=2.0), mask)
    assert next(mine, None) is None and next(other, None) is None


def test_dropout_is_reproducible_scaled_and_only_for_training() -> None:
    ours, _ = pair(dropout=0.25)
    mask, inputs = mask_of([5, 2]), random(2, 5, 5)
    draws = [ours(inputs, mask, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    torch.manual_seed(3)
    seeded = ours(inputs, mask)
    torch.manual_seed(3)
    assert torch.equal(seeded, ours(inputs, mask))
    drawn = ours._dropout_mask(4000, inputs, torch.Generator().manual_seed(1))
    assert drawn is not None and set(drawn.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(float(drawn.mean()) - 1.0) < 0.02
    ours.eval()
    assert torch.equal(ours(inputs, mask), ours(inputs, mask))


def test_carries_state_as_allennlp_where_asked() -> None:
    ours, theirs = pair(stateful=True)
    for lengths in ([4, 2, 6], [3, 3, 1], [5, 2], [2, 7, 1, 4]):
        mask = mask_of(lengths)
        inputs = random(*mask.shape, 5, seed=len(lengths))
        assert_equal_with_gradients(ours, theirs, inputs, mask)


def test_state_stays_in_its_batch_and_mode() -> None:
    mask, inputs = mask_of([4, 2]), random(2, 4, 5)
    ours, _ = pair()
    assert torch.equal(ours(inputs, mask), ours(inputs, mask))
    ours, _ = pair(stateful=True)
    fresh = ours(inputs, mask)
    assert not torch.equal(fresh, ours(inputs, mask))
    ours.eval()
    assert torch.equal(fresh, ours(inputs, mask))
    ours.train()
    assert torch.equal(fresh, ours(inputs, mask))


class Recomputed(torch.autograd.Function):
    """The fused LSTM, which repeats its forward pass before each backward pass, as gradcheck needs it."""

    @staticmethod
    def forward(ctx: Any, lstm: FusedElmoLstm, mask: Tensor, inputs: Tensor, *parameters: Tensor) -> Tensor:
        ctx.lstm, ctx.mask = lstm, mask
        ctx.save_for_backward(inputs, *parameters)
        return Recomputed.run(ctx, inputs, parameters).detach()

    @staticmethod
    def run(ctx: Any, inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        named = dict(zip(dict(ctx.lstm.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(ctx.lstm, named, (inputs, ctx.mask))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        values = [value.detach().requires_grad_() for value in ctx.saved_tensors]
        with torch.enable_grad():
            output = Recomputed.run(ctx, values[0], values[1:])
        return (None, None, *torch.autograd.grad(output, values, upstream))


def test_gradcheck() -> None:
    lstm = FusedElmoLstm(2, 2, 3, 2, memory_cell_clip_value=0.5, state_projection_clip_value=0.2).double()
    with torch.no_grad():
        for seed, parameter in enumerate(lstm.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed, scale=0.7))
    inputs = random(2, 3, 2).requires_grad_()
    mask = mask_of([2, 3])
    assert (lstm(inputs, mask)[0].abs() == 0.2).any(), "the clip is meant to act here"
    assert torch.autograd.gradcheck(lambda *values: Recomputed.apply(lstm, mask, *values), (inputs, *lstm.parameters()))


def test_a_second_backward_through_one_call_is_refused() -> None:
    ours, _ = pair()
    inputs = random(2, 4, 5).requires_grad_()
    total = ours(inputs, mask_of([4, 2])).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once per call"):
        total.backward()


def test_float32_and_no_tokens() -> None:
    ours, _ = pair()
    mask, inputs = mask_of([30, 12, 1]), random(3, 30, 5)
    wide = ours(inputs, mask)
    torch.testing.assert_close(ours.float()(inputs.float(), mask).double(), wide, rtol=1e-5, atol=1e-5)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    empty = torch.randn(2, 3, 5, requires_grad=True)
    output = ours(empty, nothing)
    assert output.shape == (2, 2, 3, 10) and not output.any()
    output.sum().backward()
    assert empty.grad is not None and not empty.grad.any()


def test_packing_places_tokens_and_refuses_holes() -> None:
    packing = Packing.of_mask(mask_of([2, 0, 3, 2]))
    assert packing.order.tolist() == [2, 0, 3]
    assert packing.sizes == [3, 3, 1]
    assert packing.tokens.tolist() == [6, 0, 9, 7, 1, 10, 8]
    assert packing.mirror.tolist() == [6, 4, 5, 3, 1, 2, 0]
    assert packing.previous.tolist() == [0, 1, 2, 3]
    assert packing.last.tolist() == [6, 4, 5]
    padded = random(4, 3, 2) * mask_of([2, 0, 3, 2])[:, :, None]
    assert torch.equal(packing.unpack(packing.pack(padded)), padded)
    with pytest.raises(ValueError, match="padding must come after"):
        Packing.of_mask(torch.tensor([[True, False, True]]))
    with pytest.raises(ValueError, match="bool tensor"):
        Packing.of_mask(torch.ones(1, 2))
