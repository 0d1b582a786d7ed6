"""Keep the sentences of a node's ranks in its shared memory, so that training needs no file after its start.

The ranks of a node divide the shards that hold their sentences, and each shard is opened by one of them: with 2,048
ranks and as many shards, nearly every part meets two shards, and the ranks would open 4,096 files for the training text
alone, where they open 2,100 together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lapse_elmo.corpus.shards import KeptSentences, ShardSet, WorkerPart
from lapse_elmo.mpi.node_memory import NodeMemory

if TYPE_CHECKING:
    from lapse_elmo.mpi.world import World


@dataclass(frozen=True)
class _Piece:
    """What one rank needs of one shard: sentences [first, end) of set ``number``, by their global numbers."""

    number: int
    local_rank: int
    shard: int
    first: int
    end: int


def keep_sentences(sets: Sequence[ShardSet], world: World) -> None:
    """Read the parts of all ranks of each node into the node's memory, once (collective).

    A rank's part is its share of a set that the ranks divide equally, in the order of the sentences. Later reads of it
    need no file. A run that resumes within an epoch with another number of ranks, which share out what is left of
    the epoch, reads other sentences as well. Sets that are too large to be kept are left out: see
    :meth:`ShardSet.kept_bytes`.

    Args:
        sets: The sets.
        world: The ranks.

    Raises:
        CorpusError: On every rank, if the data of a file, which the message names, is damaged.
        ConfigError: On every rank, if there is not enough shared memory.
    """
    sets = [shards for shards in sets if shards.kept_bytes(world.size)]
    if not sets:
        return
    pieces = _pieces_of_node(sets, world)
    files = sorted({(piece.number, piece.shard) for piece in pieces})
    reader = {file: index * world.local_size // len(files) for index, file in enumerate(files)}
    own = [i for i, piece in enumerate(pieces) if reader[piece.number, piece.shard] == world.local_rank]

    def read() -> dict[int, tuple[np.ndarray, np.ndarray]]:
        found = {}
        for i in own:
            found[i] = sets[pieces[i].number].read(np.arange(pieces[i].first, pieces[i].end))
            world.progress.work_done()
        return found

    found = world.together(read)
    for shards in sets:
        shards.close()
    sizes = np.zeros(len(pieces), np.int64)
    sizes[own] = [len(found[i][0]) for i in own]
    _share(sets, pieces, found, world.node_gather_numbers(sizes).sum(0), world)


def _pieces_of_node(sets: Sequence[ShardSet], world: World) -> list[_Piece]:
    """Return what the ranks of this node need, ordered by set, rank and sentence."""
    pieces = []
    ranks = world.node_gather_numbers(np.array([world.rank]))[:, 0].tolist()
    for number, shards in enumerate(sets):
        for local_rank, rank in enumerate(ranks):
            part = WorkerPart.of(shards.num_sentences, rank, world.size)
            for shard in shards.shards_of(part.first, part.end):
                start, stop = shards.starts[shard : shard + 2].tolist()
                pieces.append(_Piece(number, local_rank, shard, max(part.first, start), min(part.end, stop)))
    return pieces


def _share(
    sets: Sequence[ShardSet], pieces: Sequence[_Piece], found: dict[int, tuple[np.ndarray, np.ndarray]],
    sizes: np.ndarray, world: World,
) -> None:
    """Put the tokens and offsets of all ``pieces`` into shared memory, and give each set those of this rank.

    Args:
        sets: The sets.
        pieces: All pieces of the node.
        found: What this rank has read: tokens and offsets, by the index of the piece.
        sizes: (pieces,) int64, tokens of each piece.
        world: The ranks.
    """
    counts = np.array([piece.end - piece.first for piece in pieces], np.int64)
    tokens_at, counts_at = (np.concatenate([[0], np.cumsum(numbers)]).tolist() for numbers in (sizes, counts))
    memory = NodeMemory(world, {
        "tokens": ((max(tokens_at[-1], 1),), np.int32), "lengths": ((max(counts_at[-1], 1),), np.int32),
    })
    tokens, lengths = memory.arrays["tokens"], memory.arrays["lengths"]

    def put(name: str, first: int, values: np.ndarray) -> None:
        memory.reserve(name, first, first + len(values))
        memory.arrays[name][first : first + len(values)] = values

    def write() -> None:
        for i, (read_tokens, offsets) in found.items():
            put("tokens", tokens_at[i], read_tokens)
            put("lengths", counts_at[i], np.diff(offsets))

    world.together(write)
    world.node_barrier()
    for number, shards in enumerate(sets):
        mine = [i for i, piece in enumerate(pieces) if (piece.number, piece.local_rank) == (number, world.local_rank)]
        low, end = (mine[0], mine[-1] + 1) if mine else (0, 0)  # they follow each other
        offsets = np.concatenate([[0], np.cumsum(lengths[counts_at[low] : counts_at[end]], dtype=np.int64)])
        first = WorkerPart.of(shards.num_sentences, world.rank, world.size).first
        shards.kept = KeptSentences(first, tokens[tokens_at[low] : tokens_at[end]], offsets)
    memory.close()  # the views keep the memory itself
