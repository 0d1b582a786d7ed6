"""Float32 products stay float32, whichever library computes them; freed memory; what a log says of slower ways."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lapse_elmo import devices, fallbacks, native
from lapse_elmo.config.training import DeviceConfig, ModelConfig
from lapse_elmo.errors import ConfigError
from lapse_elmo.mpi.world import solo


@pytest.fixture(autouse=True)
def setting() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    yield
    matmul.fp32_precision = before


def test_the_other_library_is_taken_where_it_is_as_exact() -> None:
    taken = devices.speed_up_float32()
    assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if taken else "ieee")  # type: ignore[attr-defined]
    first, second = (torch.randn(64, 300, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    exact = first.double() @ second.double().t()
    assert float(((first @ second.t()).double() - exact).abs().max() / exact.abs().max()) < 2e-6


def test_narrower_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster way to multiply float32 is refused if it computes in bfloat16, as oneDNN may."""
    product = torch.Tensor.__matmul__

    def narrow(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return product(first if first.dtype == torch.float64 else first.bfloat16().float(), second)

    monkeypatch.setattr(torch.Tensor, "__matmul__", narrow)
    assert not devices.speed_up_float32()
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # type: ignore[attr-defined]


def test_fallbacks_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(fallbacks, "cpu_multiplies_bf16", lambda: True)
    fast = fallbacks.model_fallbacks(ModelConfig(precision="bf16"), cpu)
    monkeypatch.setattr(fallbacks, "cpu_multiplies_bf16", lambda: False)
    assert len(fallbacks.model_fallbacks(ModelConfig(precision="bf16"), cpu)) == len(fast) + 1
    assert len(fallbacks.model_fallbacks(ModelConfig(), cpu)) == len(fast)
    monkeypatch.setenv(native.SWITCH, "0")
    assert len(fallbacks.model_fallbacks(ModelConfig(), cpu)) == 4


@pytest.mark.parametrize(
    ("cuda", "says"), [(None, r"torch \S+ was built without CUDA"), ("13.0", r"torch \S+ is for CUDA 13\.0, ")]
)
def test_what_is_missing_for_a_gpu_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, says: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_DEVICE_FILES", tmp_path)
    with pytest.raises(ConfigError, match=rf"GPU 0 was asked for, but torch sees 0 GPUs on \S+ \({says}"):
        devices.choose_device(DeviceConfig(device="cuda"), solo())
    auto, cpu = DeviceConfig(), torch.device("cpu")
    assert not devices.unused_gpus(auto, cpu)
    (tmp_path / "nvidia0").touch()
    (line,) = devices.unused_gpus(auto, cpu)
    assert re.search(rf"a GPU that torch does not see \({says}", line)
    assert not devices.unused_gpus(DeviceConfig(device="cpu"), cpu)


FREED = """
import resource, sys, torch
from lapse_elmo.devices import keep_freed_memory

kept = len(sys.argv) > 1 and keep_freed_memory()
faults = []
for _ in range(40):
    torch.ones(1 << 22)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(kept, faults[-1] - faults[-11])
"""


def test_freed_memory_is_used_again() -> None:
    """Ten tensors of 16 MiB cost 40,960 faults of 4 KiB, fewer where pages are larger, or hardly any."""
    found = [
        subprocess.run([sys.executable, "-c", FREED, *argv], capture_output=True, text=True, check=True).stdout.split()
        for argv in ([], ["keep"])
    ]
    assert found[0][0] == "False"
    if found[1][0] == "False":
        pytest.skip("the C library has no mallopt")
    assert int(found[1][1]) <= int(found[0][1]) / 10


def test_an_older_c_library_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of Debian 11 or RHEL 8 refuses a threshold above 32 MiB."""
    found: dict[int, int] = {}

    def mallopt(parameter: int, value: int) -> int:
        if parameter == -3 and value > 32 << 20:
            return 0
        found[parameter] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert devices.keep_freed_memory()
    assert found == {-4: 0, -1: 2_000_000_000}
