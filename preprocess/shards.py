"""``shards``: encode training and held-out text into HDF5 shards, on any number of ranks, always to the same bytes."""

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
from lapse_elmo.corpus.text import Part, cut_into_parts, find_texts, share
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.corpus.words import Ids, new_ids, problem
from lapse_elmo.errors import ConfigError, CorpusError
from lapse_elmo.mpi.world import World

from .pieces import Piece, encode_part, piece_paths, read_group, residue_of
from .progress import bar, say
from .staging import Staging


@dataclass(frozen=True)
class _Split:
    """One of the two halves of the command: its text and where it goes."""

    name: str
    texts: list[str]
    parts: list[Part]
    num_shards: int


def make_shards(options: ShardsOptions, world: World) -> None:
    """Run the command on every rank of ``world``.

    :raises CorpusError, ConfigError, OutputError: on all ranks.
    """
    started = time.perf_counter()
    splits = world.agree(lambda: _plan(options))
    with Staging(world, options.output, options.overwrite) as staging:
        vocabulary = staging.phase(lambda: Vocabulary.load(options.vocab) if world.rank == 0 else None)[0]
        assert vocabulary is not None
        world.agree(lambda: _make_directories(staging.directory))
        ids = new_ids(vocabulary)
        summary = [_make_split(split, options, vocabulary, ids, world, staging) for split in splits]
        staging.publish("new")
    if reason := problem():
        say(world, reason)
    say(world, f"{options.output}: {'; '.join(summary)}; {time.perf_counter() - started:.1f} s")


def _plan(options: ShardsOptions) -> list[_Split]:
    train, heldout = find_texts(options.texts), find_texts(options.heldout)
    both = {os.path.realpath(path) for path in train} & {os.path.realpath(path) for path in heldout}
    if both:
        raise ConfigError(
            f"{min(both)} is both training and held-out text; perplexity on it would mean nothing, so give other files"
        )
    return [
        _Split("train", train, cut_into_parts(train), options.num_shards),
        _Split("heldout", heldout, cut_into_parts(heldout), options.num_heldout_shards),
    ]


def _make_directories(directory: Path) -> None:
    try:
        (directory / "pieces").mkdir()
        (directory / "new").mkdir()
    except OSError as error:
        raise write_failed(directory, error) from None


def _make_split(
    split: _Split, options: ShardsOptions, vocabulary: Vocabulary, ids: Ids, world: World, staging: Staging
) -> str:
    """Encode and assemble one split; returns a line about it."""
    work = share(split.parts, world.size)
    mine = work[world.rank]
    pieces_at = staging.directory / "pieces"

    def encode() -> dict[int, Piece]:
        with bar(world, sum(split.parts[n].size for n in mine), "B", f"encoding {split.name}") as progress:

            def on_block(num_bytes: int) -> None:
                progress.update(num_bytes)
                staging.check()

            pieces = {}
            for n in mine:
                paths = piece_paths(pieces_at, split.name, n)
                pieces[n] = encode_part(split.parts[n], ids, split.num_shards, paths, on_block)
            return pieces

    by_number = {n: piece for encoded in staging.phase(encode) for n, piece in encoded.items()}
    pieces = [by_number[n] for n in range(len(split.parts))]
    world.agree(lambda: _check_text(split, pieces))
    set_sha256 = _set_sha256(split, pieces, vocabulary)
    starts = np.cumsum([0] + [piece.num_sentences for piece in pieces]).tolist()

    def assemble() -> list[Header]:
        shards = range(world.rank, split.num_shards, world.size)
        with bar(world, len(shards), "shard", f"writing {split.name}") as progress:
            headers = []
            for shard in shards:
                residues = [residue_of(shard, start, split.num_shards) for start in starts[:-1]]
                header = _header(split, shard, pieces, residues, vocabulary, set_sha256, options)
                path = staging.directory / "new" / shard_name(split.name, shard, split.num_shards)
                groups = [piece_paths(pieces_at, split.name, n) for n in range(len(pieces))]
                _write_shard(path, header, split, zip(pieces, groups, residues, strict=True), staging.check)
                headers.append(header)
                progress.update(1)
            return headers

    headers = [header for some in staging.phase(assemble) for header in some]
    staging.phase(lambda: _remove([path for n in mine for path in piece_paths(pieces_at, split.name, n)]))
    tokens = sum(header.num_tokens for header in headers)
    unknown = sum(header.num_unknown for header in headers)
    return (
        f"{len(headers)} {split.name} shard{'s' if len(headers) > 1 else ''} with {starts[-1]:,} sentences, "
        f"{tokens:,} tokens ({unknown / tokens:.2%} unknown)"
    )


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink()


def _check_text(split: _Split, pieces: Sequence[Piece]) -> None:
    """Every file has sentences, and there are enough of them for the shards."""
    by_path: dict[str, int] = dict.fromkeys(split.texts, 0)
    for part, piece in zip(split.parts, pieces, strict=True):
        by_path[part.path] += piece.num_sentences
    for path, count in by_path.items():
        if not count:
            raise CorpusError(f"text {path} has no words; expected one sentence a line")
    total = sum(by_path.values())
    if total < split.num_shards:
        flag = "--num-shards" if split.name == "train" else "--num-heldout-shards"
        raise ConfigError(
            f"{total} sentence{'s' if total > 1 else ''} of {split.name} text cannot fill {split.num_shards} shards; "
            f"give {flag} {total} or fewer, or more text"
        )


def _set_sha256(split: _Split, pieces: Sequence[Piece], vocabulary: Vocabulary) -> str:
    content = [[piece.num_sentences, piece.checksum] for piece in pieces]
    identity = [split.name, split.num_shards, vocabulary.sha256, content]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _header(
    split: _Split,
    shard: int,
    pieces: Sequence[Piece],
    residues: Sequence[int],
    vocabulary: Vocabulary,
    set_sha256: str,
    options: ShardsOptions,
) -> Header:
    totals = sum(piece.counts[:, residue].sum(axis=0) for piece, residue in zip(pieces, residues, strict=True))
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
    groups: Iterable[tuple[Piece, tuple[Path, Path], int]],
    check: Callable[[], None],
) -> None:
    """Assemble one shard. Sources are kept as names without directories: where they lay says nothing to others."""
    writer = None
    try:
        writer = ShardWriter(path, header, [os.path.basename(text) for text in split.texts])
        for piece, paths, residue in groups:
            for tokens, lengths in read_group(piece, paths, residue):
                writer.append(tokens, lengths)
            check()
        writer.close()
    finally:
        if writer is not None:
            writer.abandon()
