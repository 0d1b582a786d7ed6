"""Sums of gradients over the nodes, sent as float32 or rounded to bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lapse_elmo.mpi.collectives import Collectives


class NodeSums:
    """Adds up arrays of the ranks that have the same share of their nodes' gradients.

    With bfloat16, each rank rounds its array and sends a part of it to each of the others, which adds up that part in
    float32, in the order of nodes, and sends the rounded sum back. So half of the bytes cross the network, and all
    ranks get the same bits.

    Args:
        across: The ranks, one of each node.
        bf16: Whether to send bfloat16.
    """

    def __init__(self, across: Collectives, bf16: bool) -> None:
        self._across, self._bf16 = across, bf16

    def start(self, array: np.ndarray) -> Callable[[], None]:
        """Begin to replace a contiguous float32 ``array`` (n,) by the sum (collective over the ranks).

        Returns:
            A function that waits for the sum (collective, too). ``array`` must not be touched before it returns.
        """
        if not self._bf16:
            return self._across.start_sum(array)
        comm, size = self._across.comm, self._across.size
        assert comm is not None
        part = -(-array.size // size)
        rounded = torch.zeros(size * part, dtype=torch.bfloat16)
        rounded[: array.size] = torch.from_numpy(array)
        parts = torch.empty(size, part, dtype=torch.bfloat16)
        request = comm.Ialltoall(_bits(rounded), _bits(parts))

        def finish() -> None:
            self._across.wait(request)
            total = parts[0].float()
            for other in parts[1:]:
                total += other
            # What was sent is not needed any more, so its memory takes the result.
            self._across.wait(comm.Iallgather(_bits(total.bfloat16()), _bits(rounded)))
            torch.from_numpy(array).copy_(rounded[: array.size])

        return finish


def sum_bytes(numbers: float, num_nodes: int, *, bf16: bool = False) -> float:
    """Return the bytes that each node sends per sum of ``numbers`` over the nodes, as by a ring.

    Every node sends its share of the sum twice: as a part of it, and to share the result.
    """
    return 2 * (1 - 1 / num_nodes) * (2 if bf16 else 4) * numbers


def _bits(tensor: Tensor) -> np.ndarray:
    """Return the bits of a bfloat16 tensor, which share its memory, as a type that MPI knows."""
    return tensor.view(torch.int16).numpy()
