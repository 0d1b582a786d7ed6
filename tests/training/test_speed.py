"""What makes a run fast changes none of its numbers: threads, compiled parts, reading ahead, walks through the rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

from lapse_elmo import native, perplexity
from lapse_elmo.metrics import profile
from tests.training.corpora import (
    Prepared,
    checkpoints,
    evaluate_alone,
    records,
    saved_arrays,
    train_alone,
)

OPTIONS = ("--batch-size", "8", "--max-steps", "6", "--report-every", "1", "--num-samples", "20", "--seed", "3")


def losses(run_dir: Path) -> list[float]:
    return [line["train/loss_nats"] for line in records(run_dir, "train")]


@pytest.fixture(scope="module")
def plain(small: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_alone(small, tmp_path_factory.mktemp("speed") / "plain", *OPTIONS)


def test_two_threads_train_to_the_same_bits(small: Prepared, plain: Path, tmp_path: Path) -> None:
    other = train_alone(small, tmp_path / "run", *OPTIONS, "--threads", "2")
    assert losses(other) == losses(plain)
    mine, theirs = (saved_arrays(checkpoints(run)[-1]) for run in (other, plain))
    for name, values in theirs.items():
        np.testing.assert_array_equal(mine[name], values, err_msg=name)


def test_without_a_compiler_the_losses_are_the_same(
    small: Prepared, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    other = train_alone(small, tmp_path / "run", *OPTIONS)
    assert losses(other) == pytest.approx(losses(plain), rel=1e-5)


def test_bf16_trains_near_float32(small: Prepared, plain: Path, tmp_path: Path) -> None:
    other = train_alone(small, tmp_path / "run", *OPTIONS, "--precision", "bf16")
    assert losses(other) != losses(plain)
    assert losses(other) == pytest.approx(losses(plain), rel=1e-2)


def test_walks_through_the_softmax_do_not_change_perplexity(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = evaluate_alone(plain, tmp_path / "once.json")
    monkeypatch.setattr(perplexity, "HELD_BYTES", 1 << 10)  # a pass for every 8 pairs of neighbours
    often = evaluate_alone(plain, tmp_path / "often.json", "--batch-size", "2")
    assert often["num_targets"] == once["num_targets"]
    for name in ("forward_perplexity", "backward_perplexity", "mean_perplexity"):
        assert often[name] == pytest.approx(once[name], rel=1e-6)


def test_profile_is_a_table_and_a_trace(small: Prepared, plain: Path, tmp_path: Path) -> None:
    run = train_alone(small, tmp_path / "run", *OPTIONS, "--profile", "2", "--threads", "2")
    assert losses(run) == losses(plain)
    trace = json.loads((run / profile.FOLDER / "rank-00000.json").read_text())
    ranges = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert len({event["tid"] for event in ranges if event["name"].startswith("LSTM forward")}) == 2
    assert sum(event["name"] == "step" for event in ranges) == 2
    lines = (run / profile.FOLDER / "rank-00000.txt").read_text().splitlines()
    shares = {line.split("  ")[0]: float(line.split()[-2].rstrip("%")) for line in lines[4:]}
    assert shares["matrix products"] > 0 and 50 < sum(shares.values()) < 250


def event(key: str, count: int, host_us: float, device_us: float, on_device: bool = False) -> FunctionEventAvg:
    """As torch 2.13 sums them up: a kernel's time is in its event, and in that of the operation that launched it."""
    made = FunctionEventAvg()
    made.key, made.count, made.is_user_annotation = key, count, key == "step"
    made.device_type = DeviceType.CUDA if on_device else DeviceType.CPU
    made.cpu_time_total = made.self_cpu_time_total = host_us  # type: ignore[assignment]
    made.device_time_total = made.self_device_time_total = device_us  # type: ignore[assignment]
    return made


def test_profile_of_a_gpu_shows_the_time_on_it() -> None:
    kernel = "void cutlass::Kernel2<" + 200 * "x"
    events = [
        event("step", 2, 1e6, 0), event("step", 2, 0, 0.9e6, on_device=True), event("aten::mm", 20, 0.01e6, 0.3e6),
        event("aten::addmm", 10, 0.01e6, 0.1e6), event("aten::add_", 4, 0.2e6, 0.1e6),
        event(kernel, 30, 0, 0.4e6, on_device=True), event("add_kernel", 4, 0, 0.1e6, on_device=True),
        event("_cell_forward", 8, 0, 0.25e6, on_device=True), event("aten::empty", 6, 0.05e6, 0),
    ]
    said = profile.summary(events)
    assert said.startswith("2 steps of 0.500 s; the device computes or copies for 75.0% of them")
    _, operations, _, kernels, _, host = (part.splitlines() for part in said.split("\n\n")[1:])
    tables = [[line.split() for line in lines[2:]] for lines in (operations, kernels, host)]
    found = [{" ".join(words[:-3]): words[-3:] for words in lines} for lines in tables]
    assert found[0] == {
        "matrix products": ["0.2000", "40.0%", "15.0"], "kernels of no operation": ["0.1250", "25.0%", "0.0"],
        "aten::add_": ["0.0500", "10.0%", "2.0"],
    }
    assert list(found[1]) == [kernel[:80] + "...", "_cell_forward", "add_kernel"]
    assert found[1]["_cell_forward"] == ["0.1250", "25.0%", "4.0"]
    assert found[2]["matrix products"] == ["0.0100", "2.0%", "15.0"] and len(found[2]) == 4


def test_profile_without_a_gpu_is_one_table() -> None:
    said = profile.summary([event("aten::mm", 4, 0.5e6, 0), event("step", 2, 1e6, 0)])
    assert said.startswith("2 steps of 0.500 s; self time of each kind of work\n\n") and said.count("\n\n") == 1
