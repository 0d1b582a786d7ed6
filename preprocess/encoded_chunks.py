"""Encoded chunks of text: temporary files between the ranks that encode the text and the ranks that write shards.

Sentence i of the whole text goes to shard i mod K, so that all shards are nearly equal in size and alike in content.
A rank that encodes chunk p does not know how many sentences precede it. It therefore groups the sentences of each block
by their index in the chunk modulo K (the *residue*) and writes the groups one after another to two raw files; the
counts by block and residue stay in memory. Once all chunks are counted, a shard is assembled by reading one group of
every block. The text and the files are each read once, and memory holds one block.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lapse_elmo.corpus.text import TextChunk, read_blocks
from lapse_elmo.corpus.words import WordEncoder


@dataclass(frozen=True)
class EncodedChunk:
    """Counts and checksum of one encoded chunk.

    Attributes:
        counts: (blocks, K, 3) int64, the sentences, tokens and unknown tokens of each block and residue.
        checksum: CRC-32 of the ids and lengths in the order of the text; it enters the set's ``set_sha256``.
    """

    counts: np.ndarray
    checksum: int

    @property
    def num_sentences(self) -> int:
        """Sentences of the chunk."""
        return int(self.counts[:, :, 0].sum())


def chunk_paths(directory: Path, split: str, number: int) -> tuple[Path, Path]:
    """Return the files of the tokens (int32) and of the sentence lengths (int32) of chunk ``number``."""
    return directory / f"{split}-{number}.tokens", directory / f"{split}-{number}.lengths"


def encode_chunk(
    chunk: TextChunk,
    encoder: WordEncoder,
    num_shards: int,
    paths: tuple[Path, Path],
    on_block: Callable[[int], object],
) -> EncodedChunk:
    """Encode one chunk of text.

    Args:
        chunk: The text.
        encoder: Turns words into ids.
        num_shards: K, the number of groups.
        paths: The files to write, see :func:`chunk_paths`.
        on_block: Called after each block with the number of bytes read.

    Raises:
        CorpusError: The text cannot be read.
        OSError: The files cannot be written.
    """
    counts, checksum, num_sentences = [], 0, 0
    with open(paths[0], "wb") as tokens_file, open(paths[1], "wb") as lengths_file:
        for block in read_blocks(chunk):
            tokens, lengths = encoder.encode(block)
            checksum = zlib.crc32(lengths.data, zlib.crc32(tokens.data, checksum))
            tokens, lengths, counts_of_block = encoder.group(tokens, lengths, num_sentences, num_shards)
            num_sentences += len(lengths)
            tokens_file.write(tokens.data)
            lengths_file.write(lengths.data)
            counts.append(counts_of_block)
            on_block(block.num_bytes)
    return EncodedChunk(np.array(counts, np.int64).reshape(-1, num_shards, 3), checksum)


def residue_of(shard: int, start: int, num_shards: int) -> int:
    """Return the residue of ``shard`` in a chunk whose first sentence is number ``start`` of the whole text."""
    return (shard - start) % num_shards


def read_group(
    encoded: EncodedChunk, paths: tuple[Path, Path], residue: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the sentences of one residue, block by block, as tokens and lengths (both int32)."""
    ends = encoded.counts[:, :, :2].reshape(-1, 2).cumsum(axis=0)
    num_shards = encoded.counts.shape[1]
    sizes = encoded.counts[:, residue, :2]
    starts = ends[residue::num_shards] - sizes
    with open(paths[0], "rb") as tokens_file, open(paths[1], "rb") as lengths_file:
        for (num_sentences, num_tokens), (sentence, token) in zip(sizes.tolist(), starts.tolist(), strict=True):
            if num_sentences:
                tokens = os.pread(tokens_file.fileno(), 4 * num_tokens, 4 * token)
                lengths = os.pread(lengths_file.fileno(), 4 * num_sentences, 4 * sentence)
                yield np.frombuffer(tokens, np.int32), np.frombuffer(lengths, np.int32)
