"""Where a rank computes: its device and its threads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lapse_elmo.config.training import DeviceConfig
from lapse_elmo.errors import ConfigError
from lapse_elmo.mpi.world import World

_FEW_THREADS, _THREADS_PER_CORE = 64, 4  # the most that --threads may ask for: the larger of them
_FLOAT32_ERROR = 2e-6  # of float32 products, relative to the largest; those on bfloat16 or TF32 parts are 1e-3 off


@dataclass(frozen=True)
class Device:
    """``device`` of this rank, and its number of CPU ``threads``, which torch has been set to."""

    device: torch.device
    threads: int


def choose_device(config: DeviceConfig, world: World) -> Device:
    """Collective: a node's ranks take its GPUs round robin, or the CPU; its cores are split evenly.

    :raises ConfigError: if a GPU is asked for that is not there.
    """
    available = torch.cuda.device_count() if config.device != "cpu" and torch.cuda.is_available() else 0

    def check() -> None:
        wanted = config.device_ids or range(1 if config.device == "cuda" else 0)
        for number in wanted:
            if number >= available:
                raise ConfigError(
                    f"GPU {number} is asked for but {world.host} has {available}: give --device cpu or other "
                    "--device-ids"
                )

        if config.threads > max(_FEW_THREADS, _THREADS_PER_CORE * world.cores):
            raise ConfigError(
                f"--threads is {config.threads:,}, but {world.host} has {world.cores} cores: give at most "
                f"{max(_FEW_THREADS, _THREADS_PER_CORE * world.cores)}"
            )

    world.together(check)
    threads = config.threads or max(1, world.cores // world.host_size)
    torch.set_num_threads(threads)
    speed_up_float32()
    ids = config.device_ids or tuple(range(available))
    if not ids:
        return Device(torch.device("cpu"), threads)
    device = torch.device("cuda", ids[world.host_rank % len(ids)])
    torch.cuda.set_device(device)
    return Device(device, threads)


def speed_up_float32() -> bool:
    """Let torch take oneDNN's float32 products where they are as exact as its default's; whether they are.

    Its setting for that, "bf16", allows bfloat16 products inside, which some processors take: so one product is
    compared with float64. The setting is oneDNN's alone, a GPU's products keep their precision.
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
