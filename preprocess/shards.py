"""``shards``: encode training and held-out text into HDF5 shards; the bytes are the same for any number of ranks.

All parts of the text are encoded first (encoded_chunks.py), then the shards are written. Both get their names when they
are complete. A run after a kill uses what was complete, once it has verified it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from lapse_elmo.config.preprocessing import ShardsOptions
from lapse_elmo.corpus.files import write_failed
from lapse_elmo.corpus.shards import Header, ShardFile, ShardWriter, shard_name
from lapse_elmo.corpus.text import (
    TextChunk,
    assign,
    find_texts,
    join_chunks,
    refuse_text,
    require_unchanged,
    split_into_chunks,
    text_states,
)
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.corpus.words import WordEncoder, fallback_reason, new_word_encoder
from lapse_elmo.errors import ConfigError, CorpusError
from lapse_elmo.mpi.world import World

from .encoded_chunks import EncodedPart, PartPaths, encode_part, load_part, part_paths, read_group, residue_of
from .progress import print_once, progress_bar
from .staging import Staging

T = TypeVar("T")


@dataclass(frozen=True)
class _Split:
    """Training or held-out text, and the number of its shards."""

    name: str
    texts: dict[str, tuple[int, int]]  # paths, with what require_unchanged compares
    parts: list[tuple[TextChunk, ...]]
    num_shards: int

    def shard_names(self) -> list[str]:
        """Return the file names of the shards."""
        return [shard_name(self.name, shard, self.num_shards) for shard in range(self.num_shards)]

    def sources(self) -> list[str]:
        """Return the names of the texts to store in shards: local paths mean nothing elsewhere."""
        return [os.path.basename(text) for text in self.texts]


@dataclass(frozen=True)
class _Part:
    """A part of the text to encode, with the number of groups and the files for the result."""

    chunks: tuple[TextChunk, ...]
    num_shards: int
    paths: PartPaths


def make_shards(options: ShardsOptions, world: World) -> None:
    """Run the command (collective).

    Raises:
        CorpusError: On all ranks: a text or the vocabulary cannot be used.
        ConfigError: On all ranks: there are fewer sentences than shards, a text is both training and held-out text, or
            the vocabulary is one of the texts.
        OutputError: On all ranks: the output exists or cannot be written.
    """
    started = time.perf_counter()
    splits = world.agree(lambda: _plan(options))
    with Staging(world, options.output, options.overwrite, kept=("chunks", "new")) as staging:
        vocabulary = staging.phase(lambda: Vocabulary.load(options.vocab) if world.rank == 0 else None)[0]
        assert vocabulary is not None
        parts, found, work = world.agree(lambda: _prepare(splits, vocabulary, staging.directory))
        every = [part for some in parts for part in some]
        encoded = _encode(every, found, new_word_encoder(vocabulary), work, world, staging)
        done = [[(encoded[part.paths], part.paths) for part in some] for some in parts]
        world.agree(lambda: _check_texts(splits, done))
        summary = [
            _write_shards(split, encoded_parts, options, vocabulary, work, world, staging)
            for split, encoded_parts in zip(splits, done, strict=True)
        ]
        staging.publish("new")
    if reason := fallback_reason():
        print_once(world, reason)
    print_once(world, f"{options.output}: {'; '.join(summary)}; {time.perf_counter() - started:.1f} s")


def _plan(options: ShardsOptions) -> list[_Split]:
    train, heldout = find_texts(options.texts), find_texts(options.heldout)
    # By their real paths: the same file may be named in two ways, or by a link.
    both = {os.path.realpath(path) for path in train} & {os.path.realpath(path) for path in heldout}
    if both:
        raise ConfigError(
            f"{min(both)} is both training and held-out text, which makes held-out perplexity meaningless; give "
            "different files"
        )
    # As by ``--vocab text/vocab.txt`` with the texts ``text/*.txt``: each of its words would be a sentence.
    refuse_text(options.vocab, [*train, *heldout], "the vocabulary")
    return [
        _Split("train", text_states(train), join_chunks(split_into_chunks(train)), options.num_shards),
        _Split("heldout", text_states(heldout), join_chunks(split_into_chunks(heldout)), options.num_heldout_shards),
    ]


def _prepare(
    splits: Sequence[_Split], vocabulary: Vocabulary, directory: Path
) -> tuple[list[list[_Part]], list[_Part], Path]:
    """Make the folders, and remove files of a killed run that had other text, another vocabulary or other options.

    Returns:
        The parts to encode, for each split; those of which a killed run has left a record; and the folder for files
        that are not complete. No other run knows its name, because ranks of a killed run may survive for a while on
        other nodes.
    """
    folder, new = directory / "chunks", directory / "new"
    try:
        work = Path(tempfile.mkdtemp(prefix="work-", dir=directory))
        folder.mkdir(exist_ok=True)
        new.mkdir(exist_ok=True)
        parts = [
            [
                _Part(
                    chunks, split.num_shards,
                    part_paths(folder, chunks, split.texts, vocabulary.sha256, split.num_shards),
                )
                for chunks in split.parts
            ]
            for split in splits
        ]
        wanted = {path for some in parts for part in some for path in part.paths}
        wanted |= {new / name for split in splits for name in split.shard_names()}
        # Listed, since a client of NFS that has asked for a missing file may not see it soon after a rank has made it.
        present = {*folder.iterdir(), *new.iterdir()}
        stale = present - wanted
        for path in stale:
            path.unlink()
    except OSError as error:
        raise write_failed(directory, error) from None
    if stale:
        print("files of a killed run with other text, vocabulary or options are removed", flush=True)
    return parts, [part for some in parts for part in some if part.paths.record in present], work


def _encode(
    parts: Sequence[_Part], found: Sequence[_Part], encoder: WordEncoder, work: Path, world: World, staging: Staging
) -> dict[PartPaths, EncodedPart]:
    """Encode all parts but those of ``found``, with a record of a killed run, that are complete (collective)."""

    def load(part: _Part) -> EncodedPart | None:
        return load_part(part.paths, len(part.chunks), part.num_shards, staging.check)

    loaded = _shared_out(found, load, world, staging) if found else {}
    encoded = {paths: part for paths, part in loaded.items() if part is not None}
    if found:
        print_once(world, f"resumes: {len(encoded)} of {len(parts)} parts of the text are encoded already")
    left = [part for part in parts if part.paths not in encoded]
    total = sum(chunk.size for part in _share(left, world) for chunk in part.chunks)
    with progress_bar(world, total, "B", "encoding") as progress:

        def encode(part: _Part) -> EncodedPart:
            def on_block(num_bytes: int) -> None:
                progress.update(num_bytes)
                staging.check()

            return encode_part(part.chunks, encoder, part.num_shards, part.paths, work, on_block)

        return encoded | _shared_out(left, encode, world, staging)


def _share(parts: Sequence[_Part], world: World) -> list[_Part]:
    """Return the parts of this rank."""
    work = [sum(chunk.work for chunk in part.chunks) for part in parts]
    return [parts[n] for n in assign(work, world.size)[world.rank]]


def _shared_out(
    parts: Sequence[_Part], function: Callable[[_Part], T], world: World, staging: Staging
) -> dict[PartPaths, T]:
    """Call ``function`` for all parts, each on one rank, and return the results on all of them (collective)."""
    results = staging.phase(lambda: {part.paths: function(part) for part in _share(parts, world)})
    return {paths: result for some in results for paths, result in some.items()}


def _write_shards(
    split: _Split,
    parts: Sequence[tuple[EncodedPart, PartPaths]],
    options: ShardsOptions,
    vocabulary: Vocabulary,
    work: Path,
    world: World,
    staging: Staging,
) -> str:
    """Write the shards of one split, but for those that a killed run has left (collective); returns a summary line."""
    encoded = [part for part, _ in parts]
    set_sha256 = _set_sha256(split, encoded, vocabulary)
    starts = np.cumsum([0] + [part.num_sentences for part in encoded]).tolist()
    names = split.shard_names()

    def write() -> list[tuple[Header, bool]]:
        shards = range(world.rank, split.num_shards, world.size)
        with progress_bar(world, len(shards), "shard", f"writing {split.name}") as progress:
            written = []
            for shard in shards:
                # The shard's group in a part depends on how many sentences precede the part, known only now.
                residues = [residue_of(shard, start, split.num_shards) for start in starts[:-1]]
                header = _header(split, shard, encoded, residues, vocabulary, set_sha256, options)
                path = staging.directory / "new" / names[shard]
                is_here = path.exists() and _is_shard(path, header, split.sources())
                if not is_here:
                    groups = ((*part, residue) for part, residue in zip(parts, residues, strict=True))
                    _write_shard(path, work / names[shard], header, split, groups, staging.check)
                written.append((header, is_here))
                progress.update(1)
            return written

    written = [one for some in staging.phase(write) for one in some]
    if num_here := sum(is_here for _, is_here in written):
        print_once(world, f"resumes: {num_here} of {split.num_shards} {split.name} shards are written already")
    tokens = sum(header.num_tokens for header, _ in written)
    unknown = sum(header.num_unknown for header, _ in written)
    return (
        f"{len(written)} {split.name} shard{'s' if len(written) > 1 else ''} with {starts[-1]:,} sentences, "
        f"{tokens:,} tokens ({unknown / tokens:.2%} unknown)"
    )


def _is_shard(path: Path, header: Header, sources: list[str]) -> bool:
    """Return whether ``path`` is complete and what would be written: the header has a checksum of the set's content."""
    try:
        shard = ShardFile(path)
        try:
            shard.verify()
            return shard.header == header and shard.sources() == sources
        finally:
            shard.close()
    except CorpusError:
        return False


def _check_texts(splits: Sequence[_Split], done: Sequence[Sequence[tuple[EncodedPart, PartPaths]]]) -> None:
    for split, encoded_parts in zip(splits, done, strict=True):
        require_unchanged(split.texts)
        _check_text(split, [part for part, _ in encoded_parts])


def _check_text(split: _Split, encoded: Sequence[EncodedPart]) -> None:
    """Check that every file has sentences, and that there are at least as many as shards."""
    by_path: dict[str, int] = dict.fromkeys(split.texts, 0)
    for chunks, part in zip(split.parts, encoded, strict=True):
        for chunk, num_sentences in zip(chunks, part.contents[:, 0].tolist(), strict=True):
            by_path[chunk.path] += num_sentences
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


def _set_sha256(split: _Split, encoded: Sequence[EncodedPart], vocabulary: Vocabulary) -> str:
    # Only what determines the sentences and their order: not paths, times or ranks. Runs compare it when they resume.
    content = [of_chunk for part in encoded for of_chunk in part.contents.tolist()]
    identity = [split.name, split.num_shards, vocabulary.sha256, content]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _header(
    split: _Split,
    shard: int,
    encoded: Sequence[EncodedPart],
    residues: Sequence[int],
    vocabulary: Vocabulary,
    set_sha256: str,
    options: ShardsOptions,
) -> Header:
    totals = sum(part.counts[residue] for part, residue in zip(encoded, residues, strict=True))
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
    hidden: Path,
    header: Header,
    split: _Split,
    groups: Iterable[tuple[EncodedPart, PartPaths, int]],
    check: Callable[[], None],
) -> None:
    """Assemble one shard, under the name ``hidden`` until it is complete."""
    # abandon() closes the incomplete file after an error, and does nothing after close().
    writer = None
    try:
        writer = ShardWriter(hidden, header, split.sources())
        for part, paths, residue in groups:
            for tokens, lengths in read_group(part, paths, residue):
                writer.append(tokens, lengths)
            check()
        writer.close()
    finally:
        if writer is not None:
            writer.abandon()
    os.replace(hidden, path)
