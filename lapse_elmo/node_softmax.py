"""The softmax over all words, for evaluation on several nodes: vectors travel to the rows, not rows to the vectors.

Each rank sends its predicting vectors to one rank of every node. There they meet the rows that the node owns, which lie
in its memory, and what these add to the softmax comes back. So the vectors of the job come into a node once, whatever
the vocabulary, and no rank walks through other rows than its node's.
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
    """The nll of targets, computed by all nodes together (collective: made, and called, on every rank alike).

    :param table: the softmax rows. Until it is made, nothing may move them
        (:meth:`~lapse_elmo.ps.api.ParameterServer.owned_rows`).
    """

    def __init__(self, table: RowTable, world: World, device: torch.device) -> None:
        self._table, self._world, self._device = table, world, device
        nodes = world.gather_numbers(np.array([world.node]))[:, 0]
        ranks_by_node = [np.flatnonzero(nodes == node) for node in range(world.num_nodes)]
        # One rank of each node, in the order of nodes; those of a node divide the other nodes' ranks among them.
        self._partners = [int(ranks[world.local_rank % ranks.size]) for ranks in ranks_by_node]
        share = table.server.owned_rows(table.segment.name)
        shares = exchange(world, {int(rank): share for rank in ranks_by_node[world.node]})
        self._rows = np.sort(np.concatenate([share[:0], *(part.view(np.int64) for part in shares.values())]))

    def nll(self, context: Tensor, target: Tensor) -> Tensor:
        """Collective: nll (n,) float64 of this rank's targets, in nats.

        :param context: (n, D) predicting vectors of this rank; ranks may have different n, and none.
        :param target: (n,) int64.
        """
        vectors = _bytes(context.cpu().contiguous())
        came = exchange(self._world, dict.fromkeys(self._partners, vectors))
        targets = exchange(self._world, dict.fromkeys(self._partners, target.cpu().numpy()))
        contexts = [torch.from_numpy(block).view(context.dtype).view(-1, context.shape[1]) for block in came.values()]
        wanted = [torch.from_numpy(block.view(np.int64)) for block in targets.values()]
        parts = softmax_parts(
            torch.cat([context[:0].cpu(), *contexts]).to(self._device), self._chunks(),
            torch.cat([target[:0].cpu(), *wanted]).to(self._device),
        )
        answers = torch.stack([part.to(torch.float64) for part in parts], 1).cpu()
        back = answers.split([len(some) for some in contexts])
        found = exchange(self._world, dict(zip(came, map(torch.Tensor.numpy, back), strict=True)))
        by_node = [torch.from_numpy(block.view(np.float64)).view(-1, 3) for block in found.values()]
        if not by_node:
            return torch.empty(0, dtype=torch.float64)
        return nll_of([SoftmaxParts(*part.unbind(1)) for part in by_node])

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The node's rows, as :func:`~lapse_elmo.model.full_softmax.softmax_parts` takes them."""
        for keys, weights in self._world.progress.counted(self._table.chunks_of(self._rows)):
            yield torch.from_numpy(keys).to(self._device), weights.to(self._device)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.view(-1).view(torch.uint8).numpy()


def exchange(world: World, given: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Collective: send arrays to some ranks; return what came from which, in the order of ranks, as flat bytes.

    Empty arrays are not sent.
    """
    blocks = {rank: np.ascontiguousarray(given[rank]).reshape(-1).view(np.uint8) for rank in sorted(given)}
    if world.comm is None:
        return {rank: block for rank, block in blocks.items() if block.size}
    sizes, coming = np.zeros(world.size, np.int64), np.empty(world.size, np.int64)
    for rank, block in blocks.items():
        sizes[rank] = block.size
    world.wait(world.comm.Ialltoall(sizes, coming))
    out = np.concatenate([np.empty(0, np.uint8), *blocks.values()])
    into = np.empty(int(coming.sum()), np.uint8)
    ends, starts = np.cumsum(coming), np.cumsum(sizes) - sizes
    world.wait(world.comm.Ialltoallv([out, (sizes, starts)], [into, (coming, ends - coming)]))
    return {int(rank): into[ends[rank] - coming[rank] : ends[rank]] for rank in np.flatnonzero(coming)}
