"""The mean over the ranks of the dense parameters' gradients: over MPI, or between GPUs over NCCL."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lapse_elmo.errors import in_one_line
from lapse_elmo.mpi.host import own_address
from lapse_elmo.mpi.world import World
from lapse_elmo.native import switched_on

SWITCH = "LAPSE_ELMO_NCCL"
_START_S = 60.0
# How late a rank may be for a sum. By default NCCL aborts the job after 10 minutes, even if the rank only waits for its
# file system, or all ranks were suspended; finding ranks that hang is the watchdog's task. (As milliseconds, 31 bits.)
_LONGEST_S = 20 * 24 * 3600


class DenseMean(Protocol):
    """Averages gradients over the ranks (collective: every rank makes the same calls in the same order)."""

    def start(self, gradients: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to average ``gradients``, which are not changed.

        Returns:
            A function that waits for and returns the means, of the same shapes and with the same bits on every rank.
            Their memory is reused by the next ``start``.
        """

    def close(self) -> None:
        """Release its resources."""


def open_dense_mean(world: World, device: torch.device, numbers: int) -> tuple[DenseMean, str]:
    """Open the fastest means of averaging: NCCL if every rank has a GPU of its own, else MPI (collective).

    Args:
        world: The world.
        device: Where the gradients are.
        numbers: How many float32 numbers all gradients have together.

    Returns:
        The averager, and the reason why several GPUs do not use NCCL (to be logged), or "".
    """
    over_mpi = MpiMean(world, device, numbers)
    gpus, allowed = zip(*world.allgather((_gpu(device), switched_on(SWITCH))), strict=True)
    if world.size == 1 or None in gpus or len(set(gpus)) == 1:
        return over_mpi, ""
    if not all(allowed):
        return over_mpi, f"switched off by {SWITCH}: the dense gradients are summed by the host over MPI, not by NCCL"
    if len(set(gpus)) < world.size:
        return over_mpi, "ranks share a GPU: the dense gradients are summed by the host over MPI, not by NCCL"
    # It may wait without a limit, say where a firewall blocks its connections: the watchdog then tells where.
    world.progress.enter(f"start, joining NCCL ({SWITCH}=0 does without)")
    found, why = open_torch_mean(world, device, numbers, "nccl")
    if found is None:
        return over_mpi, f"NCCL does not work here: the dense gradients are summed by the host over MPI: {why}"
    return found, ""


def _gpu(device: torch.device) -> str | None:
    """Return an identifier of the GPU; None for another device."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


class MpiMean:
    """Averages on the host, over MPI."""

    def __init__(self, world: World, device: torch.device, numbers: int) -> None:
        self._world, self._device = world, device
        self._flat = np.empty(numbers if world.size > 1 else 0, np.float32)

    def start(self, gradients: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to average ``gradients``; see :meth:`DenseMean.start`."""
        if self._world.size == 1:
            return lambda: list(gradients)
        start = 0
        for gradient in gradients:
            end = start + gradient.numel()
            np.copyto(self._flat[start:end], gradient.cpu().numpy().reshape(-1))
            start = end
        summed = self._world.start_sum(self._flat)

        def finish() -> list[Tensor]:
            summed()
            return _shaped(torch.from_numpy(self._flat).div_(self._world.size).to(self._device), gradients)

        return finish

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def open_torch_mean(
    world: World, device: torch.device, numbers: int, backend: str, start_s: float = _START_S
) -> tuple[TorchMean | None, str]:
    """Open and try a :class:`TorchMean` (collective).

    Args:
        world: The world.
        device: Where the gradients are.
        numbers: How many float32 numbers all gradients have together.
        backend: A backend of torch.distributed.
        start_s: Seconds within which the ranks must have found each other.

    Returns:
        The averager and "", or None and the reason why the backend cannot be used.
    """
    mean = TorchMean(world, device, numbers)
    address, port = own_address(world.allgather(world.host)) or world.host, 0
    # Each step only starts once all ranks have done the one before: a backend waits forever for a missing rank.
    why = _attempt(world, lambda: mean.find(address, port, start_s) if world.rank == 0 else None)
    if not why:
        address, port = world.bcast((address, mean.port))
        why = _attempt(world, lambda: mean.find(address, port, start_s) if world.rank else None)
    why = why or _attempt(world, lambda: mean.join(backend))
    if why:
        mean.close()
        return None, why
    return mean, ""


def _attempt(world: World, step: Callable[[], None]) -> str:
    """Run ``step`` on every rank (collective); return torch's first error with its rank, or ""."""
    problem = ""
    try:
        step()
    except (RuntimeError, ValueError) as error:
        problem = in_one_line(error)
    return next((f"[{where}] {text}" for text, where in world.allgather((problem, str(world))) if text), "")


class TorchMean:
    """Averages between the ranks' devices, over torch.distributed; see :func:`open_torch_mean`."""

    def __init__(self, world: World, device: torch.device, numbers: int) -> None:
        self._world = world
        self._flat = torch.empty(numbers, device=device)
        self._store: dist.TCPStore | None = None

    @property
    def port(self) -> int:
        """The port of this rank's store; 0 without one."""
        return self._store.port if self._store is not None else 0

    def find(self, address: str, port: int, start_s: float) -> None:
        """Open the store through which the ranks find each other (on rank 0, at a free port), or connect to it."""
        timeout = datetime.timedelta(seconds=start_s)
        self._store = dist.TCPStore(
            address, port, self._world.size, self._world.rank == 0, timeout, wait_for_workers=False
        )

    def join(self, backend: str) -> None:
        """Form the process group, and try it (collective).

        Raises:
            RuntimeError: From torch, or if a trial sum is wrong.
            ValueError: From torch.
        """
        world, device = self._world, self._flat.device
        dist.init_process_group(
            backend, store=self._store, rank=world.rank, world_size=world.size,
            device_id=device if device.type == "cuda" else None, timeout=datetime.timedelta(seconds=_LONGEST_S),
        )
        trial = torch.full((2,), world.rank + 1.0, device=device)
        dist.all_reduce(trial)
        if trial.tolist() != [world.size * (world.size + 1) / 2] * 2:
            raise RuntimeError(f"its sum of the ranks' numbers is wrong: {trial.tolist()}")

    def start(self, gradients: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to average ``gradients``; see :meth:`DenseMean.start`."""
        torch.cat([gradient.reshape(-1) for gradient in gradients], out=self._flat)
        work = dist.all_reduce(self._flat, async_op=True)

        def finish() -> list[Tensor]:
            assert work is not None
            work.wait()  # with NCCL the device's stream waits, not the host
            return _shaped(self._flat.div_(self._world.size), gradients)

        return finish

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _shaped(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]
