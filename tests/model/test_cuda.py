"""The same step on a GPU: skipped where there is none."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor

from lapse_elmo.model.bilm import BiLM, BiLMOptions
from lapse_elmo.model.full_softmax import full_softmax_nll
from lapse_elmo.model.pointwise import triton_problem
from lapse_elmo.model.softmax import sampled_softmax_nll
from lapse_elmo.tables import Uploader
from tests.model.padded import outputs_of
from tests.model.test_precision import LENGTHS, MASK, SIZE, random

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def step(device: str, dtype: torch.dtype, precision: str = "fp32") -> dict[str, Tensor]:
    """Return the loss and gradients of a training step and the nll of the full softmax, on the CPU."""
    options = BiLMOptions(SIZE, 48, 2, dropout=0.1, recurrent_dropout=0.1, precision=precision)
    model = BiLM(options, torch.Generator().manual_seed(1)).to(device, dtype)
    shapes = ((12 * 8, SIZE), (61, SIZE + 1))
    rows, softmax = (random(n, w, seed=n).to(device, dtype).requires_grad_() for n, w in shapes)
    outputs = outputs_of(model, rows.view(8, 12, SIZE), MASK, torch.Generator().manual_seed(2))
    context = torch.cat([output[MASK.to(device)] for output in outputs])
    target = (torch.arange(len(context)) * 7 % 61).to(device)
    nll = sampled_softmax_nll(
        context, softmax, target, torch.arange(0, 61, 2, device=device),
        random(61, seed=5).to(device), chunk=20, precision=precision,
    )
    nll.backward()
    full = full_softmax_nll(context.detach(), [(0, softmax.detach())], target)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    everything = {"nll": nll.detach(), "full": full, "rows": rows.grad, "softmax": softmax.grad, **found}
    return {name: value.cpu() for name, value in everything.items() if value is not None}


@GPU
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_cpu(dtype: torch.dtype, bound: float) -> None:
    there, here = step("cuda", dtype), step("cpu", torch.float64)
    assert there.keys() == here.keys()
    for name, value in here.items():
        assert float((there[name].double() - value).norm() / value.norm()) < bound, name


@GPU
def test_steps_are_kernels() -> None:
    """Steps on a GPU use Triton's kernels if Triton is installed, so test_equals_the_cpu compares these."""
    pytest.importorskip("triton")
    assert not triton_problem(torch.device("cuda", 0))


@GPU
def test_bf16_gradients() -> None:
    exact = step("cpu", torch.float64)
    for name, value in step("cuda", torch.float32, "bf16").items():
        assert float((value.double() - exact[name]).norm() / exact[name].norm()) < 2e-2, name


@GPU
def test_the_time_loop_never_waits_for_the_host() -> None:
    """Forward and backward passes over packed rows never synchronise with the GPU."""
    from lapse_elmo.model.packing import Packing

    lstm = BiLM(BiLMOptions(SIZE, 48, 2), torch.Generator().manual_seed(1)).to("cuda").lstm
    packing = Packing.of_mask(MASK).to(torch.device("cuda"))
    rows = random(int(LENGTHS.sum()), SIZE, seed=3).cuda().requires_grad_()
    lstm.run(rows, packing)[-1][0].sum().backward()  # type: ignore[operator]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        lstm.run(rows, packing)[-1][0].sum().backward()  # type: ignore[operator]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_rows_cross_whole(device: str) -> None:
    """Strided rows are uploaded whole and contiguous, even if their memory is reused before they are used."""
    uploader = Uploader(torch.device(device))
    rows = torch.from_numpy(np.arange(50_000 * 8, dtype=np.float32).reshape(-1, 8))
    kept = rows.clone()
    first, second = uploader.start(rows[:, :3]), uploader.start(rows[:, 4:])
    if device == "cuda":
        rows.zero_()
    for take, columns in ((second, slice(4, None)), (first, slice(0, 3))):
        found = take()
        assert found.is_contiguous() and found.device.type == device
        assert torch.equal(found.cpu(), kept[:, columns])


def test_a_copy_is_waited_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first table's event lies before the second copy, which it need not wait for; in a fake of CUDA's stream."""
    queued: list[str] = []
    waited: dict[str, list[str]] = {}

    class Stream:
        def record_event(self) -> list[str]:
            return list(queued)  # all that is complete when this event is

        def wait_event(self, event: list[str]) -> None:
            waited[taking[0]] = event

    class Rows:
        shape, dtype = (2, 3), torch.float32

        def __init__(self, name: str) -> None:
            self.name = name

        def copy_(self, rows: Rows) -> Rows:
            return rows

        def to(self, device: torch.device, non_blocking: bool) -> Rows:
            assert non_blocking
            queued.append(self.name)
            return self

        def record_stream(self, stream: Stream) -> None:
            assert stream is current

    current, taking = Stream(), [""]
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Rows("pinned"))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    uploader = Uploader(torch.device("cpu"))
    uploader._stream = Stream()  # type: ignore[assignment]
    takes = {name: uploader.start(Rows(name)) for name in ("softmax", "words")}  # type: ignore[arg-type]
    for name, take in takes.items():
        taking[0] = name
        take()
    assert waited == {"softmax": ["softmax"], "words": ["softmax", "words"]}
