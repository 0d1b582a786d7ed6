"""Pieces: encoded text on its way from the ranks that read it to the shards that it goes to.

Sentence i of the whole text goes to shard i mod K, so the shards are alike and near-equal. A rank that encodes part p
of the text does not know yet how many sentences the parts before it have. So it groups the sentences of each block by
their number in the part modulo K (their *residue*) and writes the groups one after another to a piece, two raw files;
counts by block and residue stay in memory. When all parts are counted, a shard is put together by reading one group of
every block. So the text is read once, every piece is read once, and memory holds one block.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lapse_elmo.corpus.text import Part, read_blocks
from lapse_elmo.corpus.words import Ids


@dataclass(frozen=True)
class Piece:
    """What is known of one encoded part.

    :ivar counts: int64 (blocks, K, 3): sentences, tokens, unknown tokens of each block and residue.
    :ivar checksum: of the ids in their order; part of the name of the set.
    """

    counts: np.ndarray
    checksum: int

    @property
    def num_sentences(self) -> int:
        return int(self.counts[:, :, 0].sum())


def piece_paths(directory: Path, split: str, number: int) -> tuple[Path, Path]:
    """The files with the tokens (int32) and the sentence lengths (int32) of a part."""
    return directory / f"{split}-{number}.tokens", directory / f"{split}-{number}.lengths"


def encode_part(
    part: Part,
    ids: Ids,
    num_shards: int,
    paths: tuple[Path, Path],
    on_block: Callable[[int], object],
) -> Piece:
    """Write the piece of ``part``; ``on_block`` is told the bytes read.

    :raises CorpusError: for text that cannot be read. :raises OSError: if the piece cannot be written.
    """
    counts, checksum, num_sentences = [], 0, 0
    with open(paths[0], "wb") as tokens_file, open(paths[1], "wb") as lengths_file:
        for block in read_blocks(part):
            tokens, lengths = ids.encode(block)
            checksum = zlib.crc32(lengths.data, zlib.crc32(tokens.data, checksum))
            tokens, lengths, counts_of_block = ids.group(tokens, lengths, num_sentences, num_shards)
            num_sentences += len(lengths)
            tokens_file.write(tokens.data)
            lengths_file.write(lengths.data)
            counts.append(counts_of_block)
            on_block(block.num_bytes)
    return Piece(np.array(counts, np.int64).reshape(-1, num_shards, 3), checksum)


def residue_of(shard: int, start: int, num_shards: int) -> int:
    """The residue that goes to ``shard`` in a part whose first sentence is number ``start`` of the whole text."""
    return (shard - start) % num_shards


def read_group(piece: Piece, paths: tuple[Path, Path], residue: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The sentences of one residue, block by block: tokens and lengths."""
    ends = piece.counts[:, :, :2].reshape(-1, 2).cumsum(axis=0)
    num_shards = piece.counts.shape[1]
    sizes = piece.counts[:, residue, :2]
    starts = ends[residue::num_shards] - sizes
    with open(paths[0], "rb") as tokens_file, open(paths[1], "rb") as lengths_file:
        for (num_sentences, num_tokens), (sentence, token) in zip(sizes.tolist(), starts.tolist(), strict=True):
            if num_sentences:
                tokens = os.pread(tokens_file.fileno(), 4 * num_tokens, 4 * token)
                lengths = os.pread(lengths_file.fileno(), 4 * num_sentences, 4 * sentence)
                yield np.frombuffer(tokens, np.int32), np.frombuffer(lengths, np.int32)
