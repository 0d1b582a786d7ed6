"""Encoded parts of text: temporary files between the ranks that encode the text and the ranks that write shards.

Sentence i of the whole text goes to shard i mod K, so that all shards are nearly equal in size and alike in content.
A rank that encodes part p does not know how many sentences precede it. It therefore groups the sentences of each block
by their index in the part modulo K (the *residue*) and writes the groups one after another to two raw files, tokens
and lengths (both int32). Once all parts are counted, a shard is assembled by reading one group of every block. The
text and the files are each read once, and a rank holds one block in memory.

A part consists of one or several chunks of text (:func:`join_chunks`). Each shard opens the files of each part, and all
ranks hold the counts of all parts, so 100,000 small files must not become 100,000 parts.

A third file, the record, gets its name last. It holds the place of every group in the other two files: a gigabyte in
all for 20 GB of text and 2,048 shards, of which each rank needs only the places of its own shards. It also holds the
counts and the checksum, so that a run after a kill can use the files (:func:`load_part`). The files are not flushed to
the disk, which would cost time in every run. Instead, their checksum is verified when they are used again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import lapse_elmo
from lapse_elmo.corpus import text
from lapse_elmo.corpus.shard_file import ranges
from lapse_elmo.corpus.text import TextChunk, read_blocks
from lapse_elmo.corpus.words import WordEncoder

_FORMAT = 3  # of the three files; another number gives them other names
_DIGEST_BYTES = 32
_PLACE = 4  # int64 of a group in the record: its sentences and tokens, and how many of each precede it in the files


@dataclass(frozen=True)
class EncodedPart:
    """Counts and checksums of one encoded part: what every rank knows of it.

    Attributes:
        counts: (K, 3) int64, the sentences, tokens and unknown tokens of each residue.
        num_blocks: Blocks of the part.
        contents: (chunks, 2) int64, for each chunk its sentences, and the CRC-32 of their ids and lengths in the order
            of the text; they enter the set's ``set_sha256``.
    """

    counts: np.ndarray
    num_blocks: int
    contents: np.ndarray

    @property
    def num_sentences(self) -> int:
        """Sentences of the part."""
        return int(self.contents[:, 0].sum())


class PartPaths(NamedTuple):
    """The files of one encoded part."""

    tokens: Path
    lengths: Path
    record: Path


def part_paths(
    directory: Path, chunks: Sequence[TextChunk], states: Mapping[str, tuple[int, int]], vocabulary_sha256: str,
    num_shards: int,
) -> PartPaths:
    """Return the files of a part. Their name is a checksum of all that their content depends on.

    Args:
        directory: Where the files are.
        chunks: The chunks of the part.
        states: What :func:`~lapse_elmo.corpus.text.text_states` returned for their texts before they were read.
        vocabulary_sha256: Checksum of the vocabulary.
        num_shards: K, the number of groups.
    """
    inputs: list[object] = [_FORMAT, lapse_elmo.__version__, text.BLOCK_BYTES, vocabulary_sha256, num_shards]
    for chunk in chunks:
        inputs.append([os.path.realpath(chunk.path), *states[chunk.path], chunk.start, chunk.end])
    name = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    return PartPaths(*(directory / f"{name}.{kind}" for kind in PartPaths._fields))


def encode_part(
    chunks: Sequence[TextChunk],
    encoder: WordEncoder,
    num_shards: int,
    paths: PartPaths,
    work: Path,
    on_block: Callable[[int], object],
) -> EncodedPart:
    """Encode one part of the text.

    Args:
        chunks: The chunks of the part.
        encoder: Turns words into ids.
        num_shards: K, the number of groups.
        paths: The files to write, see :func:`part_paths`.
        work: A folder on the same file system, for the files until they are complete.
        on_block: Called after each block with the number of bytes read.

    Raises:
        CorpusError: The text cannot be read.
        OSError: The files cannot be written.
    """
    counts, contents, num_sentences = [], [], 0
    hidden = PartPaths(*(work / path.name for path in paths))
    with open(hidden.tokens, "wb") as tokens_file, open(hidden.lengths, "wb") as lengths_file:
        for chunk in chunks:
            first, checksum = num_sentences, 0
            for block in read_blocks(chunk):
                tokens, lengths = encoder.encode(block)
                # Before grouping: the checksum is of the text, whatever the number of shards.
                checksum = _checksum(tokens, lengths, checksum)
                tokens, lengths, counts_of_block = encoder.group(tokens, lengths, num_sentences, num_shards)
                num_sentences += len(lengths)
                tokens_file.write(tokens.data)
                lengths_file.write(lengths.data)
                # A block has fewer than 2**31 tokens. Millions of groups are counted: a compressed file is one chunk.
                counts.append(counts_of_block.astype(np.int32))
                on_block(block.num_bytes)
            contents.append((num_sentences - first, checksum))
    blocks = np.array(counts, np.int32).reshape(-1, num_shards, 3)
    counts.clear()
    encoded = EncodedPart(blocks.sum(axis=0, dtype=np.int64), len(blocks), np.array(contents, np.int64))
    _write_record(hidden.record, blocks, encoded)
    for complete, path in zip(hidden, paths, strict=True):  # the record is the last one
        os.replace(complete, path)
    return encoded


def _write_record(path: Path, blocks: np.ndarray, encoded: EncodedPart) -> None:
    """Write the record of a part, given the counts (blocks, K, 3) of its groups: a digest, places and counts."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        file.write(bytes(_DIGEST_BYTES))
        for numbers in itertools.chain(_places(blocks), [encoded.counts, encoded.contents]):
            content = numbers.tobytes()
            digest.update(content)
            file.write(content)
        file.seek(0)
        file.write(digest.digest())


def _places(blocks: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the places (blocks, ``_PLACE``) of the groups of each residue, given the counts (blocks, K, 3) of all."""
    # The files hold block after block, and in a block residue after residue. Column 0 counts sentences, which are
    # entries of the lengths file, column 1 tokens.
    of_blocks = blocks[:, :, :2].sum(axis=1, dtype=np.int64)
    starts = of_blocks.cumsum(axis=0) - of_blocks
    for residue in range(blocks.shape[1]):
        sizes = blocks[:, residue, :2]
        yield np.concatenate([sizes, starts], axis=1)
        starts += sizes


def load_part(
    paths: PartPaths, num_chunks: int, num_shards: int, on_block: Callable[[], object]
) -> EncodedPart | None:
    """Check the files of a part that an earlier run encoded.

    Args:
        paths: The files.
        num_chunks: The number of chunks of the part.
        num_shards: K, the number of groups.
        on_block: Called after each block.

    Returns:
        What :func:`encode_part` returned; None if a file is missing, cut short or damaged.
    """
    try:
        record = paths.record.read_bytes()
        numbers = memoryview(record)[_DIGEST_BYTES:]  # not copied
        if hashlib.sha256(numbers).digest() != record[:_DIGEST_BYTES]:
            return None
        values = np.frombuffer(numbers, np.int64)
        num_counts, num_contents = 3 * num_shards, 2 * num_chunks
        places, counts, contents = np.split(values, [-num_counts - num_contents, -num_contents])
        places = places.reshape(num_shards, -1, _PLACE)
        # Copies, not views of all places.
        encoded = EncodedPart(counts.reshape(-1, 3).copy(), places.shape[1], contents.reshape(-1, 2).copy())
        found, chunk, num_sentences = np.zeros_like(encoded.contents), 0, 0
        with open(paths.tokens, "rb") as tokens_file, open(paths.lengths, "rb") as lengths_file:
            for size_of_lengths, size_of_tokens in places[:, :, :2].sum(axis=0).tolist():
                tokens = np.frombuffer(tokens_file.read(4 * size_of_tokens), np.int32)
                lengths = np.frombuffer(lengths_file.read(4 * size_of_lengths), np.int32)
                if len(lengths) != size_of_lengths or not len(tokens) == size_of_tokens == lengths.sum():
                    return None
                while len(lengths) and found[chunk, 0] == encoded.contents[chunk, 0]:
                    chunk += 1  # no block has lines of two chunks
                checksum = _checksum(*_ungroup(tokens, lengths, num_sentences, num_shards), int(found[chunk, 1]))
                found[chunk] += len(lengths), checksum - found[chunk, 1]
                num_sentences += len(lengths)
                on_block()
    except (OSError, ValueError, IndexError):  # missing, or not a whole number of integers or groups
        return None
    return encoded if np.array_equal(found, encoded.contents) else None


def _checksum(tokens: np.ndarray, lengths: np.ndarray, before: int) -> int:
    return zlib.crc32(lengths.data, zlib.crc32(tokens.data, before))


def _ungroup(tokens: np.ndarray, lengths: np.ndarray, first: int, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Undo :meth:`WordEncoder.group`: return tokens and lengths in the order of the text."""
    order = np.argsort((first + np.arange(len(lengths))) % num_groups, kind="stable")
    starts = np.empty(len(lengths), np.int64)
    starts[order] = np.cumsum(lengths, dtype=np.int64) - lengths
    in_text = np.empty_like(lengths)
    in_text[order] = lengths
    return tokens[ranges(starts, in_text)], in_text


def residue_of(shard: int, start: int, num_shards: int) -> int:
    """Return the residue of ``shard`` in a part whose first sentence is number ``start`` of the whole text."""
    return (shard - start) % num_shards


def read_group(encoded: EncodedPart, paths: PartPaths, residue: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the sentences of one residue, block by block, as tokens and lengths (both int32)."""
    num_bytes = encoded.num_blocks * _PLACE * np.dtype(np.int64).itemsize
    with open(paths.record, "rb") as record_file:
        row = os.pread(record_file.fileno(), num_bytes, _DIGEST_BYTES + residue * num_bytes)
    places = np.frombuffer(row, np.int64).reshape(-1, _PLACE)
    assert (places[:, :2].sum(axis=0) == encoded.counts[residue, :2]).all(), f"{paths.record} has changed"
    with open(paths.tokens, "rb") as tokens_file, open(paths.lengths, "rb") as lengths_file:
        for num_sentences, num_tokens, sentence, token in places.tolist():
            if num_sentences:
                # One read per group at a known place; a shard's groups are far apart, so a buffer would read in vain.
                tokens = os.pread(tokens_file.fileno(), 4 * num_tokens, 4 * token)
                lengths = os.pread(lengths_file.fileno(), 4 * num_sentences, 4 * sentence)
                yield np.frombuffer(tokens, np.int32), np.frombuffer(lengths, np.int32)
