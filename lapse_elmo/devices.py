"""Where a rank computes: its device and its threads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lapse_elmo.config.training import DeviceConfig
from lapse_elmo.errors import ConfigError
from lapse_elmo.world import World, usable_cores


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

    world.together(check)
    threads = config.threads or max(1, usable_cores() // world.host_size)
    torch.set_num_threads(threads)
    ids = config.device_ids or tuple(range(available))
    if not ids:
        return Device(torch.device("cpu"), threads)
    device = torch.device("cuda", ids[world.host_rank % len(ids)])
    torch.cuda.set_device(device)
    return Device(device, threads)
