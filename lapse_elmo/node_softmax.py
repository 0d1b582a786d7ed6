"""The softmax over all words on several nodes, for evaluation: vectors are sent to the rows, not rows to the vectors.

Each rank sends its context vectors to one rank of every node. That rank computes the part of the softmax over the rows
that its node owns, which are in its memory, and sends the result back. So each vector enters a node once, for any
size of the vocabulary, and no rank reads rows of another node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from lapse_elmo.model.full_softmax import SoftmaxParts, nll_of, softmax_parts
from lapse_elmo.mpi.world import World
from lapse_elmo.tables import RowTable


class NodeSoftmax:
    """Computes the nll of targets on all nodes together (collective: every rank constructs and calls it).

    Attributes:
        most_senders: The most ranks whose vectors one rank receives: one per node, or more where nodes have different
            numbers of ranks.

    Args:
        table: The softmax rows. No row may move between the server's last ``quiesce`` and the construction, because it
            calls :meth:`~lapse_elmo.ps.api.ParameterServer.owned_rows`.
        world: The world.
        device: Where this rank computes.
    """

    def __init__(self, table: RowTable, world: World, device: torch.device) -> None:
        self._table, self._world, self._device = table, world, device
        nodes = world.gather_numbers(np.array([world.node]))[:, 0]
        ranks_by_node = [np.flatnonzero(nodes == node) for node in range(world.num_nodes)]
        # This rank's partner on each node, in the order of nodes. The ranks of a node share the work evenly.
        self._partners = [int(ranks[world.local_rank % ranks.size]) for ranks in ranks_by_node]
        sizes = np.array([ranks.size for ranks in ranks_by_node])
        self.most_senders = int((-(-sizes // sizes.min())).sum())  # those of the first rank of the smallest node
        share = table.server.owned_rows(table.segment.name)
        shares = exchange(world, {int(rank): share for rank in ranks_by_node[world.node]})
        # (With an empty array first, since a rank may receive nothing.)
        self._rows = np.sort(np.concatenate([share[:0], *(part.view(np.int64) for part in shares.values())]))

    def nll(self, context: Tensor, target: Tensor) -> Tensor:
        """Return the nll (n,) float64 of this rank's targets, in nats (collective).

        Args:
            context: (n, D) context vectors of this rank; n may differ between ranks and may be 0.
            target: (n,) int64, the rows of the targets.
        """
        vectors = _bytes(context.cpu().contiguous())
        received = exchange(self._world, dict.fromkeys(self._partners, vectors))
        targets = exchange(self._world, dict.fromkeys(self._partners, target.cpu().numpy()))
        contexts = [
            torch.from_numpy(block).view(context.dtype).view(-1, context.shape[1]) for block in received.values()
        ]
        wanted = [torch.from_numpy(block.view(np.int64)) for block in targets.values()]
        parts = softmax_parts(
            torch.cat([context[:0].cpu(), *contexts]).to(self._device), self._chunks(),
            torch.cat([target[:0].cpu(), *wanted]).to(self._device),
        )
        answers = torch.stack([part.to(torch.float64) for part in parts], 1).cpu()
        back = answers.split([len(some) for some in contexts])
        found = exchange(self._world, dict(zip(received, map(torch.Tensor.numpy, back), strict=True)))
        by_node = [torch.from_numpy(block.view(np.float64)).view(-1, 3) for block in found.values()]
        if not by_node:
            return torch.empty(0, dtype=torch.float64)
        return nll_of([SoftmaxParts(*part.unbind(1)) for part in by_node])

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the node's rows in the form that :func:`~lapse_elmo.model.full_softmax.softmax_parts` takes."""
        for keys, weights in self._world.progress.counted(self._table.chunks_of(self._rows)):
            yield torch.from_numpy(keys).to(self._device), weights.to(self._device)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.view(-1).view(torch.uint8).numpy()


def exchange(world: World, given: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Send an array to each of some ranks (collective); empty arrays are not sent.

    An array for several ranks is not copied for each of them.

    Returns:
        What was received as flat bytes, keyed by the sender, in the order of ranks.
    """
    distinct = {id(array): np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in given.values()}
    if world.comm is None:
        return {rank: distinct[id(array)] for rank, array in sorted(given.items()) if array.size}
    sizes, starts, coming = (np.zeros(world.size, np.int64) for _ in range(3))
    ends_of = dict(zip(distinct, np.cumsum([block.size for block in distinct.values()]).tolist(), strict=True))
    for rank, array in given.items():
        sizes[rank] = distinct[id(array)].size
        starts[rank] = ends_of[id(array)] - sizes[rank]
    world.wait(world.comm.Ialltoall(sizes, coming))
    out = np.concatenate([np.empty(0, np.uint8), *distinct.values()])
    into = np.empty(int(coming.sum()), np.uint8)
    ends = np.cumsum(coming)
    world.wait(world.comm.Ialltoallv([out, (sizes, starts)], [into, (coming, ends - coming)]))
    return {int(rank): into[ends[rank] - coming[rank] : ends[rank]] for rank in np.flatnonzero(coming)}
