"""bfloat16 products against float64, two threads against one, and what the step keeps in memory."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lapse_elmo.errors import ConfigError
from lapse_elmo.model import products
from lapse_elmo.model.bilm import BiLM, BiLMOptions
from lapse_elmo.model.products import Matmul
from lapse_elmo.model.softmax import sampled_softmax_nll
from lapse_elmo.model.two_threads import run_two_threads
from tests.model.padded import outputs_of

LENGTHS = torch.tensor([9, 4, 12, 1, 0, 7, 12, 3])
MASK = torch.arange(12)[None, :] < LENGTHS[:, None]
SIZE = 16


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(precision: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the loss and all gradients of a training step of a biLM with a sampled softmax."""
    options = BiLMOptions(SIZE, 48, 2, dropout=0.1, recurrent_dropout=0.1, precision=precision)
    model = BiLM(options, torch.Generator().manual_seed(1)).to(dtype)
    rows, softmax = (random(n, w, seed=n).to(dtype).requires_grad_() for n, w in ((12 * 8, SIZE), (61, SIZE + 1)))
    forward, backward = outputs_of(model, rows.view(8, 12, SIZE), MASK, torch.Generator().manual_seed(2))
    context = torch.cat([forward[MASK], backward[MASK]])
    target = torch.arange(len(context)) * 7 % 61
    nll = sampled_softmax_nll(
        context, softmax, target, torch.arange(0, 61, 2), random(61, seed=5), chunk=20,
        precision=precision,
    )
    nll.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"nll": nll.detach(), "rows": rows.grad, "softmax": softmax.grad, **found}  # type: ignore[dict-item]


def errors(precision: str) -> dict[str, float]:
    """Return each gradient's distance from that in float64, relative to its norm."""
    exact = step("fp32", torch.float64)
    return {
        name: float((value.double() - exact[name]).norm() / exact[name].norm())
        for name, value in step(precision).items()
    }


@pytest.fixture(params=[False, True], ids=["multiplied in float32", "multiplied in bfloat16"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Pretend that the processor has or lacks bf16 instructions; torch's products are right in both cases."""
    monkeypatch.setattr(products, "cpu_multiplies_bf16", lambda: request.param)
    return request.param


def test_bf16_gradients(has_bf16: bool) -> None:
    found = errors("bf16")
    assert found["nll"] < 2e-3 and max(found.values()) < 2e-2, found
    assert sorted(found.values())[len(found) // 2] < 1e-2, found
    assert max(found.values()) > 1e-4, "this was not computed in bfloat16"
    assert max(errors("fp32").values()) < 2e-6


def test_bf16_is_the_same_however_it_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for native in (False, True):
        monkeypatch.setattr(products, "cpu_multiplies_bf16", lambda native=native: native)
        results.append(step("bf16"))
    for name, value in results[0].items():
        assert float((value - results[1][name]).norm() / value.norm()) < 1e-2, name


def test_bf16_keeps_everything_outside_in_float32(has_bf16: bool) -> None:
    assert all(value.dtype == torch.float32 for value in step("bf16").values())
    assert Matmul.of("bf16", torch.empty(1)).emulated is not has_bf16
    assert Matmul.of("bf16", torch.empty(1, dtype=torch.float64)).storage == torch.float64


def test_evaluation_is_not_narrowed() -> None:
    results = []
    for precision in ("fp32", "bf16"):
        model = BiLM(BiLMOptions(SIZE, 48, 2, precision=precision), torch.Generator().manual_seed(1)).eval()
        results.append(torch.stack(outputs_of(model, random(8, 12, SIZE, seed=3), MASK)))
    assert torch.equal(*results)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision"):
        BiLMOptions(precision="fp16")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_threads_give_the_bits_of_one(precision: str) -> None:
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(step(precision))
        assert torch.get_num_threads() == count
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.usefixtures("threads")
def test_halves_share_the_threads_and_an_error_comes_through() -> None:
    def look(half: int) -> tuple[int, int, bool]:
        return half, torch.get_num_threads(), torch.is_grad_enabled()

    for count, expected in ((1, (1, 1)), (2, (1, 1)), (5, (3, 2))):
        torch.set_num_threads(count)
        assert run_two_threads(look, torch.device("cpu"), "") == ((0, expected[0], False), (1, expected[1], False))
        assert torch.get_num_threads() == count and torch.is_grad_enabled()

    def fail(half: int) -> float:
        return 1 / (1 - half)

    for count in (1, 2):
        torch.set_num_threads(count)
        with pytest.raises(ZeroDivisionError):
            run_two_threads(fail, torch.device("cpu"), "")
        assert torch.get_num_threads() == count


@pytest.mark.usefixtures("threads")
def test_a_forked_process_starts_its_own_second_thread() -> None:
    """As the workers of ``multiprocessing.Pool`` after the parent has used a model."""
    torch.set_num_threads(2)

    def part(number: int) -> int:
        return number

    assert run_two_threads(part, torch.device("cpu"), "") == (0, 1)
    worker = multiprocessing.get_context("fork").Process(target=run_two_threads, args=(part, torch.device("cpu"), ""))
    worker.start()
    worker.join(20)
    ended = worker.exitcode
    worker.kill()
    assert ended == 0


def test_products_round_once() -> None:
    a, b = random(5, 40, seed=1), random(40, 3, seed=2)
    exact = a.bfloat16().double() @ b.bfloat16().double()
    for kind in (Matmul(torch.bfloat16), Matmul(torch.bfloat16, emulated=True)):
        found = kind.mm(kind.cast(a), kind.cast_weight(b))
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-3)
        total = torch.full((5, 3), 100.0)
        kind.addmm_into(total, kind.cast(a), kind.cast_weight(b))
        torch.testing.assert_close(total.double(), exact + 100, rtol=3e-3, atol=1e-6)
    assert math.isclose(float(Matmul(torch.float32).mm(a, b)[0, 0]), float((a @ b)[0, 0]), rel_tol=1e-6)
