"""``shards``: encode training and held-out text into HDF5 shards; the bytes are the same for any number of ranks."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lapse_elmo.config.preprocessing import ShardsOptions
from lapse_elmo.corpus.files import write_failed
from lapse_elmo.corpus.shards import Header, ShardWriter, shard_name
from lapse_elmo.corpus.text import TextChunk, assign_chunks, find_texts, split_into_chunks
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.corpus.words import WordEncoder, fallback_reason, new_word_encoder
from lapse_elmo.errors import ConfigError, CorpusError
from lapse_elmo.mpi.world import World

from .encoded_chunks import EncodedChunk, chunk_paths, encode_chunk, read_group, residue_of
from .progress import print_once, progress_bar
from .staging import Staging


@dataclass(frozen=True)
class _Split:
    """Training or held-out text, and the number of its shards."""

    name: str
    texts: list[str]
    chunks: list[TextChunk]
    num_shards: int


def make_shards(options: ShardsOptions, world: World) -> None:
    """Run the command (collective).

    Raises:
        CorpusError: On all ranks: a text or the vocabulary cannot be used.
        ConfigError: On all ranks: there are fewer sentences than shards, or a text is both training and held-out text.
        OutputError: On all ranks: the output exists or cannot be written.
    """
    started = time.perf_counter()
    splits = world.agree(lambda: _plan(options))
    with Staging(world, options.output, options.overwrite) as staging:
        vocabulary = staging.phase(lambda: Vocabulary.load(options.vocab) if world.rank == 0 else None)[0]
        assert vocabulary is not None
        world.agree(lambda: _make_directories(staging.directory))
        encoder = new_word_encoder(vocabulary)
        summary = [_make_split(split, options, vocabulary, encoder, world, staging) for split in splits]
        staging.publish("new")
    if reason := fallback_reason():
        print_once(world, reason)
    print_once(world, f"{options.output}: {'; '.join(summary)}; {time.perf_counter() - started:.1f} s")


def _plan(options: ShardsOptions) -> list[_Split]:
    train, heldout = find_texts(options.texts), find_texts(options.heldout)
    both = {os.path.realpath(path) for path in train} & {os.path.realpath(path) for path in heldout}
    if both:
        raise ConfigError(
            f"{min(both)} is both training and held-out text, which makes held-out perplexity meaningless; give "
            "different files"
        )
    return [
        _Split("train", train, split_into_chunks(train), options.num_shards),
        _Split("heldout", heldout, split_into_chunks(heldout), options.num_heldout_shards),
    ]


def _make_directories(directory: Path) -> None:
    try:
        (directory / "chunks").mkdir()
        (directory / "new").mkdir()
    except OSError as error:
        raise write_failed(directory, error) from None


def _make_split(
    split: _Split, options: ShardsOptions, vocabulary: Vocabulary, encoder: WordEncoder, world: World, staging: Staging
) -> str:
    """Encode the text of one split and write its shards (collective); returns a summary line."""
    work = assign_chunks(split.chunks, world.size)
    mine = work[world.rank]
    folder = staging.directory / "chunks"

    def encode() -> dict[int, EncodedChunk]:
        with progress_bar(world, sum(split.chunks[n].size for n in mine), "B", f"encoding {split.name}") as progress:

            def on_block(num_bytes: int) -> None:
                progress.update(num_bytes)
                staging.check()

            encoded = {}
            for n in mine:
                paths = chunk_paths(folder, split.name, n)
                encoded[n] = encode_chunk(split.chunks[n], encoder, split.num_shards, paths, on_block)
            return encoded

    by_number = {n: chunk for chunks in staging.phase(encode) for n, chunk in chunks.items()}
    encoded = [by_number[n] for n in range(len(split.chunks))]
    world.agree(lambda: _check_text(split, encoded))
    set_sha256 = _set_sha256(split, encoded, vocabulary)
    starts = np.cumsum([0] + [chunk.num_sentences for chunk in encoded]).tolist()

    def assemble() -> list[Header]:
        shards = range(world.rank, split.num_shards, world.size)
        with progress_bar(world, len(shards), "shard", f"writing {split.name}") as progress:
            headers = []
            for shard in shards:
                residues = [residue_of(shard, start, split.num_shards) for start in starts[:-1]]
                header = _header(split, shard, encoded, residues, vocabulary, set_sha256, options)
                path = staging.directory / "new" / shard_name(split.name, shard, split.num_shards)
                groups = [chunk_paths(folder, split.name, n) for n in range(len(encoded))]
                _write_shard(path, header, split, zip(encoded, groups, residues, strict=True), staging.check)
                headers.append(header)
                progress.update(1)
            return headers

    headers = [header for some in staging.phase(assemble) for header in some]
    staging.phase(lambda: _remove([path for n in mine for path in chunk_paths(folder, split.name, n)]))
    tokens = sum(header.num_tokens for header in headers)
    unknown = sum(header.num_unknown for header in headers)
    return (
        f"{len(headers)} {split.name} shard{'s' if len(headers) > 1 else ''} with {starts[-1]:,} sentences, "
        f"{tokens:,} tokens ({unknown / tokens:.2%} unknown)"
    )


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink()


def _check_text(split: _Split, encoded: Sequence[EncodedChunk]) -> None:
    """Check that every file has sentences, and that there are at least as many as shards."""
    by_path: dict[str, int] = dict.fromkeys(split.texts, 0)
    for chunk, encoded_chunk in zip(split.chunks, encoded, strict=True):
        by_path[chunk.path] += encoded_chunk.num_sentences
    for path, count in by_path.items():
        if not count:
            raise CorpusError(f"text {path} has no words; expected one sentence per line")
    total = sum(by_path.values())
    if total < split.num_shards:
        flag = "--num-shards" if split.name == "train" else "--num-heldout-shards"
        raise ConfigError(
            f"{total} sentence{'s' if total > 1 else ''} of {split.name} text cannot fill {split.num_shards} shards; "
            f"give {flag} {total} or less, or more text"
        )


def _set_sha256(split: _Split, encoded: Sequence[EncodedChunk], vocabulary: Vocabulary) -> str:
    content = [[chunk.num_sentences, chunk.checksum] for chunk in encoded]
    identity = [split.name, split.num_shards, vocabulary.sha256, content]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _header(
    split: _Split,
    shard: int,
    encoded: Sequence[EncodedChunk],
    residues: Sequence[int],
    vocabulary: Vocabulary,
    set_sha256: str,
    options: ShardsOptions,
) -> Header:
    totals = sum(chunk.counts[:, residue].sum(axis=0) for chunk, residue in zip(encoded, residues, strict=True))
    num_sentences, num_tokens, num_unknown = (int(total) for total in totals)
    used = {"num_shards": options.num_shards, "num_heldout_shards": options.num_heldout_shards}
    return Header(
        split=split.name,
        shard_index=shard,
        num_shards=split.num_shards,
        num_sentences=num_sentences,
        num_tokens=num_tokens,
        num_unknown=num_unknown,
        vocabulary_sha256=vocabulary.sha256,
        vocabulary_size=vocabulary.size,
        set_sha256=set_sha256,
        options=json.dumps(used, sort_keys=True),
    )


def _write_shard(
    path: Path,
    header: Header,
    split: _Split,
    groups: Iterable[tuple[EncodedChunk, tuple[Path, Path], int]],
    check: Callable[[], None],
) -> None:
    """Assemble one shard. Only base names of the sources are stored: local paths mean nothing elsewhere."""
    writer = None
    try:
        writer = ShardWriter(path, header, [os.path.basename(text) for text in split.texts])
        for chunk, paths, residue in groups:
            for tokens, lengths in read_group(chunk, paths, residue):
                writer.append(tokens, lengths)
            check()
        writer.close()
    finally:
        if writer is not None:
            writer.abandon()
