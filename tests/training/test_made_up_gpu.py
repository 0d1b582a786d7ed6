"""The GPU path on a made-up GPU: no operation has tensors of both devices, and results are those of a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lapse_elmo import devices, train
from tests.made_up_gpu import DEVICE, MadeUpGpu
from tests.model import test_cuda
from tests.training.corpora import Prepared, checkpoints, records, train_alone


@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [(torch.float64, "fp32", 1e-10), (torch.float32, "fp32", 1e-5), (torch.float32, "bf16", 2e-2)],
)
def test_a_step_equals_the_cpu(dtype: torch.dtype, precision: str, bound: float) -> None:
    here = test_cuda.step("cpu", torch.float64)
    with MadeUpGpu() as gpu:
        there = test_cuda.step(str(DEVICE), dtype, precision)
    assert there.keys() == here.keys()
    for name, value in here.items():
        assert float((there[name].double() - value).norm() / value.norm()) < bound, name
    assert not [place for place in gpu.waits if place.startswith("model/lstm")]


def test_tensors_of_both_devices_are_refused() -> None:
    with MadeUpGpu(), pytest.raises(RuntimeError, match=r"aten.add.* of tensors on both devices"):
        torch.ones(3).to(DEVICE) + torch.ones(3)


def train_there(corpus: Prepared, run_dir: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Run bin/train on the made-up GPU."""
    monkeypatch.setattr(train, "choose_device", lambda *_: devices.Device(DEVICE, 1))
    with MadeUpGpu():
        train_alone(corpus, run_dir, *options)


@pytest.mark.parametrize(
    "options",
    [(), ("--num-samples", "20"), ("--accumulate", "2"), ("--context", "mix", "--recurrent-dropout", "0.2"),
     ("--precision", "bf16"), ("--dense", "ps"), ("--dense-optimizer", "adagrad", "--dense-average", "0")],
    ids=" ".join,
)  # fmt: skip
def test_runs_train_save_and_resume(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    for steps in ("4", "8"):  # the second run resumes
        train_there(small, tmp_path / "run", monkeypatch, "--max-steps", steps, "--evaluate-every", "4", *options)
    assert [path.name for path in checkpoints(tmp_path / "run")][-1] == "step-00000008"


def test_a_run_learns_as_on_a_cpu(small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check, where = train.check_memory, []

    def noted(*arguments: Any) -> tuple[str, ...]:
        where.append(arguments[-1])
        return check(*arguments)

    monkeypatch.setattr(train, "check_memory", noted)
    given = ("--max-steps", "8", "--evaluate-every", "4", "--num-samples", "20")
    train_alone(small, tmp_path / "here", *given)
    train_there(small, tmp_path / "there", monkeypatch, *given)
    losses = [
        [line["train/loss_nats"] for line in records(tmp_path / name) if line["kind"] == "train"]
        for name in ("here", "there")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert len(losses[0]) >= 1
    assert where == [[False], [True]], "whether the memory is counted as that of a GPU"
