"""Choose the device and the number of threads with which a rank computes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from lapse_elmo.config.training import DeviceConfig
from lapse_elmo.errors import ConfigError
from lapse_elmo.mpi.world import World

_MAX_THREADS, _MAX_THREADS_PER_CORE = 64, 4  # --threads may be at most the larger of the two limits
# Parameters of glibc's mallopt: the size from which a block is a mapping of its own, how many of these there may be,
# and how much freed memory is kept.
_MMAP_THRESHOLD, _MMAP_MAX, _TRIM_THRESHOLD, _UNLIMITED = -3, -4, -1, 2_000_000_000
_DEVICE_FILES = Path("/dev")
_FLOAT32_ERROR = 2e-6  # largest relative error of true float32 products; with bfloat16 or TF32 it is about 1e-3


@dataclass(frozen=True)
class Device:
    """The device of this rank, and the number of CPU threads that torch uses."""

    device: torch.device
    threads: int


def choose_device(config: DeviceConfig, world: World) -> Device:
    """Choose this rank's device and set torch's number of threads (collective).

    The ranks of a machine take its GPUs (all, or those of --device-ids) in turn, or the CPU, and share its cores evenly
    unless --threads is given.

    Raises:
        ConfigError: On every rank, if a machine lacks a GPU that was asked for, or --threads is far above its cores.
    """
    available = torch.cuda.device_count() if config.device != "cpu" and torch.cuda.is_available() else 0

    def check() -> None:
        wanted = config.device_ids or range(1 if config.device == "cuda" else 0)
        for number in wanted:
            if number >= available:
                raise ConfigError(
                    f"GPU {number} was asked for, but torch sees {available} GPUs on {world.host}"
                    f"{_why_none(available)}: give --device cpu or other --device-ids"
                )

        if config.threads > max(_MAX_THREADS, _MAX_THREADS_PER_CORE * world.cores):
            raise ConfigError(
                f"--threads is {config.threads:,}, but {world.host} has {world.cores} cores: give at most "
                f"{max(_MAX_THREADS, _MAX_THREADS_PER_CORE * world.cores)}"
            )

    world.together(check)
    threads = config.threads or max(1, world.cores // world.host_size)
    torch.set_num_threads(threads)
    speed_up_float32()
    keep_freed_memory()
    ids = config.device_ids or tuple(range(available))
    if not ids:
        return Device(torch.device("cpu"), threads)
    device = torch.device("cuda", ids[world.host_rank % len(ids)])
    torch.cuda.set_device(device)
    # Products of bfloat16 are summed in float32, as on CPUs. By default cuBLAS may add up parts in bfloat16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return Device(device, threads)


def unused_gpus(config: DeviceConfig, device: torch.device) -> list[str]:
    """Return a line for the log if ``--device auto`` took the CPU of a machine that has NVIDIA GPUs."""
    if config.device != "auto" or device.type != "cpu" or not any(_DEVICE_FILES.glob("nvidia[0-9]*")):
        return []
    return [f"this machine has a GPU that torch does not see{_why_none(0)}: the CPU computes"]


def _why_none(available: int) -> str:
    """Return, for a message, which CUDA a torch that sees no GPU is for; "" if it sees some."""
    if available:
        return ""
    built = torch.version.cuda or torch.version.hip
    kind = f"is for CUDA {built}, which needs a driver that supports it" if built else "was built without CUDA"
    return f" (torch {torch.__version__} {kind})"


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next tensors, if it can, and return whether it does.

    The tensors of a step are about as large as those of the step before. By default, large ones go back to the system
    when they are freed, and each step waits for new pages: at ``original`` sizes for a tenth of its processor time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    # Older versions, such as 2.31, refuse a size above 32 MiB.
    without_mappings = mallopt(_MMAP_THRESHOLD, _UNLIMITED) == 1 or mallopt(_MMAP_MAX, 0) == 1
    return mallopt(_TRIM_THRESHOLD, _UNLIMITED) == 1 and without_mappings


def speed_up_float32() -> bool:
    """Enable oneDNN's float32 matrix products if they are as accurate as torch's default; return whether they are.

    torch uses oneDNN for them only with the setting "bf16", which also allows bfloat16 products inside, and some
    processors have these. So one product is compared with float64, and the setting is undone if it is too far off. It
    concerns oneDNN alone: the products of a GPU keep their precision.
    """
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(64, 512, generator=generator), torch.randn(512, 256, generator=generator)
    exact = first.double() @ second.double()
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    setting.fp32_precision = "bf16"
    error = float(((first @ second).double() - exact).abs().max() / exact.abs().max())
    if error > _FLOAT32_ERROR:
        setting.fp32_precision = "ieee"
    return error <= _FLOAT32_ERROR
