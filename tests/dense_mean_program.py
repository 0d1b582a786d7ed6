"""The ranks of tests/test_dense_mean.py: ``cpu|cuda FOLDER``."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lapse_elmo import dense_mean
from lapse_elmo.dense_mean import DenseMean, MpiMean, TorchMean, open_dense_mean, open_torch_mean
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from tests import collective

CPU = torch.device("cpu")
SHAPES = ((3, 5), (7,), (), (40, 300))
NUMBERS = sum(torch.Size(shape).numel() for shape in SHAPES)


class Checks:
    """Checks that run on every rank."""

    def __init__(self, world: World, device: torch.device = CPU) -> None:
        self.world, self.device = world, device

    def gradients(self, rank: int, step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(100 * step + rank)
        return [torch.randn(shape, generator=generator).to(self.device) for shape in SHAPES]

    def means(self, mean: DenseMean) -> None:
        """At each of three steps, all ranks get the same bits of the right means, and gradients do not change."""
        for step in range(3):
            mine = self.gradients(self.world.rank, step)
            kept = [gradient.clone() for gradient in mine]
            found = mean.start(mine)()
            assert all(map(torch.equal, mine, kept))
            everyone = [self.gradients(rank, step) for rank in range(self.world.size)]
            for number, part in enumerate(found):
                expected = torch.stack([gradients[number].double() for gradients in everyone]).mean(0)
                torch.testing.assert_close(part.double(), expected, rtol=1e-6, atol=1e-6)
            flat = torch.cat([part.reshape(-1) for part in found]).cpu()
            assert all(torch.equal(flat, other) for other in self.world.allgather(flat))

    def over_mpi(self) -> None:
        self.means(MpiMean(self.world, CPU, NUMBERS))

    def over_torch(self) -> None:
        """The path for NCCL, run with torch's backend for CPUs, works twice in one process."""
        for _ in range(2):
            mean, why = open_torch_mean(self.world, CPU, NUMBERS, "gloo")
            assert mean is not None, why
            self.means(mean)
            mean.close()

    def a_late_rank(self) -> None:
        """The ranks wait for one that is later than torch's default, here a second, lets it be."""
        dist.distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=1)
        mean, why = open_torch_mean(self.world, CPU, NUMBERS, "gloo")
        assert mean is not None, why
        if self.world.rank == 0:
            time.sleep(3)
        self.means(mean)
        mean.close()

    def over_nccl(self) -> None:
        mean: DenseMean | None
        if self.world.size > 1:
            mean, reason = open_dense_mean(self.world, self.device, NUMBERS)
        else:  # a run of one rank needs no means, but one GPU can still try NCCL
            mean, reason = open_torch_mean(self.world, self.device, NUMBERS, "nccl")
        assert isinstance(mean, TorchMean), reason
        self.means(mean)
        mean.close()

    def without_gpus(self) -> None:
        mean, reason = open_dense_mean(self.world, CPU, NUMBERS)
        assert isinstance(mean, MpiMean) and not reason

    def with_gpus(self) -> None:
        """NCCL serves ranks with a GPU each; where it fails, MPI replaces it and the log says why."""
        said = {}
        for name, gpu in (("own", self.world.rank), ("one", 0), ("shared", min(self.world.rank, 1))):
            dense_mean._gpu = lambda _, gpu=gpu: str(gpu)  # type: ignore[misc]
            mean, said[name] = open_dense_mean(self.world, CPU, NUMBERS)
            self.means(mean)
        assert "NCCL does not work here" in said["own"] or self.world.size == 1
        if self.world.rank == self.world.size - 1:
            os.environ[dense_mean.SWITCH] = "0"
        dense_mean._gpu = lambda _: str(self.world.rank)  # type: ignore[assignment]
        mean, reason = open_dense_mean(self.world, CPU, NUMBERS)
        assert isinstance(mean, MpiMean)
        assert reason.startswith("switched off by LAPSE_ELMO_NCCL") == (self.world.size > 1)
        assert said["one"] == ""
        assert ("ranks share a GPU" in said["shared"]) == (self.world.size > 2)

    def one_rank_fails(self) -> None:
        """If one rank cannot start the backend, all ranks learn of it and none waits."""
        last = self.world.size - 1

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no way out\nand more")

        if self.world.rank == last:
            dense_mean.dist.TCPStore = fail  # type: ignore[assignment, misc]
        mean, why = open_torch_mean(self.world, CPU, NUMBERS, "gloo")
        assert mean is None and why.startswith(f"[rank {last}/") and why.endswith(" no way out")


def names(device: str) -> list[str]:
    if device == "cuda":
        return ["over_nccl"]
    return ["over_mpi", "over_torch", "a_late_rank", "without_gpus", "with_gpus", "one_rank_fails"]


def main(argv: list[str], enter: Callable[[], World]) -> None:
    world = enter()
    torch.set_num_threads(1)
    device = torch.device("cuda", world.rank) if argv[0] == "cuda" else CPU
    if argv[0] == "cuda":
        torch.cuda.set_device(device)
    checks = Checks(world, device)
    collective.run({name: getattr(checks, name) for name in names(argv[0])}, world, Path(argv[1]))


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="dense_mean_program")
