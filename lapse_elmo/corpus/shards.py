"""Read a set of shards as one sequence of sentences.

Sentences are numbered globally, in the order of the shards: first those of shard 0, then those of shard 1, and so on.
"""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lapse_elmo.corpus.shard_file import SPLITS, Header, ShardFile, ShardWriter, select, shard_name
from lapse_elmo.corpus.vocabulary import Vocabulary, VocabularyFile
from lapse_elmo.errors import CorpusError
from lapse_elmo.inputs import RecentFiles

if TYPE_CHECKING:
    from lapse_elmo.mpi.world import World

__all__ = ["Header", "ShardFile", "ShardSet", "ShardWriter", "WorkerPart", "find_shards", "shard_name"]

_COUNT_TOKENS = 1 << 20  # tokens per read when counting
# The largest part of a corpus that a rank keeps in memory: a billion words are kept by 17 ranks or more.
_MOST_KEPT_BYTES = 1 << 28
_MOST_OPEN = 64  # files of a set

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class WorkerPart:
    """The range [first, end) of sentence numbers that a worker owns."""

    first: int
    end: int

    @classmethod
    def of(cls, num_sentences: int, worker: int, num_workers: int) -> WorkerPart:
        """Return the range of ``worker``, one of ``num_workers``."""
        return cls(num_sentences * worker // num_workers, num_sentences * (worker + 1) // num_workers)


@dataclass(frozen=True)
class KeptSentences:
    """Sentences in memory: number ``first + i`` is ``tokens[offsets[i]:offsets[i + 1]]``."""

    first: int
    tokens: np.ndarray  # int32
    offsets: np.ndarray  # int64

    def has(self, indices: np.ndarray) -> bool:
        """Return whether all of ``indices`` (n,), ascending and not empty, are here."""
        return bool(self.first <= indices[0] and indices[-1] < self.first + len(self.offsets) - 1)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what :meth:`ShardSet.read` does."""
        return select(self.tokens, self.offsets, indices - self.first)


class ShardSet:
    """All sentences of one split. Each process opens a file when it reads from it, and keeps the latest ones open.

    Attributes:
        paths: The files, by shard number.
        split: ``train`` or ``heldout``.
        num_sentences: Sentences of the set.
        num_tokens: Tokens of the set, without boundaries.
        num_unknown: How many of the tokens are unknown words.
        vocabulary_size: V, the number of classes; ids are 1 to V.
        vocabulary_sha256: Checksum of the vocabulary file that the ids refer to.
        set_sha256: Identifies the set; the same text, vocabulary and options give the same value.
        starts: (shards + 1,) int64, the number of each shard's first sentence, and in the end the number of sentences.
        kept: Sentences in memory, of which reads need no file; None at first. Files that hold others stay usable.
    """

    def __init__(self, files: Sequence[ShardFile]) -> None:
        """Combine ``files``, ordered by shard number. Use :meth:`open`, which checks that they form a set."""
        self._files = list(files)
        headers = [file.header for file in files]
        self.paths = [file.path for file in files]
        self.split = headers[0].split
        self.num_sentences = sum(header.num_sentences for header in headers)
        self.num_tokens = sum(header.num_tokens for header in headers)
        self.num_unknown = sum(header.num_unknown for header in headers)
        self.vocabulary_size = headers[0].vocabulary_size
        self.vocabulary_sha256 = headers[0].vocabulary_sha256
        self.set_sha256 = headers[0].set_sha256
        self.starts = np.cumsum([0] + [header.num_sentences for header in headers])
        self.kept: KeptSentences | None = None
        self._recent = RecentFiles(self._files.__getitem__, _MOST_OPEN)  # which a read opens

    @classmethod
    def open(
        cls, paths: PathLike | Sequence[PathLike], split: str = "train",
        vocabulary: Vocabulary | VocabularyFile | None = None,
    ) -> ShardSet:
        """Open the set of shards at ``paths``.

        Args:
            paths: A directory (its shards of ``split``), a glob pattern, files, or several of these.
            split: ``train`` or ``heldout``.
            vocabulary: If given, the vocabulary that the shards must have been made with.

        Raises:
            CorpusError: There is no shard of ``split``; a shard is missing, duplicate, damaged, or of another set,
                split, format or version; the set has no sentence; or it was made with another vocabulary.
        """
        assert split in SPLITS, split
        arguments = [paths] if isinstance(paths, (str, os.PathLike)) else paths
        files = [ShardFile(path) for path in find_shards(arguments, split)]
        for file in files:
            if file.header.split != split:
                raise CorpusError(f"shard {file.path} holds {file.header.split} text; expected shards of {split} text")
        _check_set(files)
        shards = cls(sorted(files, key=lambda file: file.header.shard_index))
        if not shards.num_sentences:
            raise CorpusError(f"the {split} shards at {Path(files[0].path).parent} hold no sentences; make them again")
        if vocabulary is not None and vocabulary.sha256 != shards.vocabulary_sha256:
            raise CorpusError(
                f"shard {files[0].path} was made with the vocabulary of SHA-256 {shards.vocabulary_sha256[:16]}... "
                f"({shards.vocabulary_size} classes), but the one given has {vocabulary.sha256[:16]}... "
                f"({vocabulary.size} classes); give the vocabulary of the shards, or make the shards again"
            )
        return shards

    @classmethod
    def open_on_all(
        cls, world: World, paths: PathLike | Sequence[PathLike], split: str, vocabulary: Vocabulary | VocabularyFile
    ) -> ShardSet:
        """Open the set on all ranks (collective). Only rank 0 reads the headers; see :meth:`open` for the arguments.

        Raises:
            CorpusError: As for :meth:`open`, or a rank cannot read the shard at which its part of the corpus begins.
        """
        known = world.agree(lambda: [(file.path, file.header) for file in cls.open(paths, split, vocabulary)._files])
        shards = cls([ShardFile(path, header) for path, header in known])

        def require_own() -> None:
            path = shards.paths[len(shards.paths) * world.rank // world.size]
            if not os.access(path, os.R_OK):
                raise CorpusError(
                    f"cannot read shard {path} on {world.host}; put the shards on a file system that all nodes share"
                )

        world.together(require_own)
        return shards

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read sentences by their global number; neighbours are read together.

        Args:
            indices: (n,) int64, ascending.

        Returns:
            The concatenated tokens, int32, and the offsets (n + 1,), int64: sentence ``indices[i]`` is
            ``tokens[offsets[i]:offsets[i + 1]]``.

        Raises:
            CorpusError: The data of a file, which the message names, is damaged.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices):
            assert indices.min() >= 0, "negative sentence number"
            assert indices.max() < self.num_sentences, "sentence number out of range"
            assert (np.diff(indices) >= 0).all(), "sentence numbers must ascend"
            if self.kept is not None and self.kept.has(indices):
                return self.kept.read(indices)
        cuts = np.searchsorted(indices, self.starts)
        tokens, lengths = [np.empty(0, np.int32)], [np.zeros(1, np.int64)]
        for number in np.flatnonzero(np.diff(cuts)).tolist():
            local = indices[cuts[number] : cuts[number + 1]] - self.starts[number]
            shard_tokens, shard_lengths = self._recent.get(number).read(local)
            tokens.append(shard_tokens)
            lengths.append(shard_lengths)
        return np.concatenate(tokens), np.cumsum(np.concatenate(lengths))

    def kept_bytes(self, num_parts: int) -> int:
        """Return the memory that one of ``num_parts`` equal parts of the set takes; 0 if it is too much to be kept."""
        num_bytes = (4 * self.num_tokens + 12 * self.num_sentences) // num_parts
        return num_bytes if num_bytes <= _MOST_KEPT_BYTES else 0

    def shards_of(self, first: int, end: int) -> range:
        """Return the numbers of the shards that hold the sentences [``first``, ``end``)."""
        if first >= end:
            return range(0)
        return range(
            int(np.searchsorted(self.starts, first, "right")) - 1, int(np.searchsorted(self.starts, end, "left"))
        )

    def unigram_counts(self, world: World) -> np.ndarray:
        """Count how often each id occurs (collective). Each rank counts a part, the one that it keeps if any.

        Returns:
            The counts, (V + 1,) int64, equal on all ranks.

        Raises:
            CorpusError: The data of a file, which the message names, is damaged.
        """
        counts = np.zeros(self.vocabulary_size + 1, np.int64)
        for tokens in self._chunks_of(world):
            counts += np.bincount(tokens, minlength=len(counts))
            world.progress.work_done()
        world.sum_(counts)
        return counts

    def _chunks_of(self, world: World) -> Iterator[np.ndarray]:
        """Yield the tokens that this rank counts, at most ``_COUNT_TOKENS`` at a time: those it keeps, if any."""
        if self.kept is not None:
            for start in range(0, len(self.kept.tokens), _COUNT_TOKENS):
                yield self.kept.tokens[start : start + _COUNT_TOKENS]
            return
        sizes = [file.header.num_tokens for file in self._files]
        chunks = ((number, start) for number, size in enumerate(sizes) for start in range(0, size, _COUNT_TOKENS))
        for number, start in itertools.islice(chunks, world.rank, None, world.size):
            yield self._recent.get(number).tokens(start, min(start + _COUNT_TOKENS, sizes[number]))

    def close(self) -> None:
        """Close all files. A later read opens them again."""
        self._recent.close()

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.num_sentences


def find_shards(arguments: Sequence[PathLike], split: str | None = None) -> list[str]:
    """Return the shard files that ``arguments`` name, without duplicates.

    Args:
        arguments: Files, glob patterns, or directories, which stand for the shards inside them.
        split: Which shards of a directory; None for those of both splits.

    Raises:
        CorpusError: An argument names no shard.
    """
    pattern = f"{split or '*'}-*-of-*.h5"
    kind = f"{split} shards" if split else "shards"
    found: dict[str, str] = {}
    for path in arguments:
        argument = os.fspath(path)
        if os.path.isdir(argument):
            names = glob.glob(os.path.join(glob.escape(argument), pattern))
        elif os.path.lexists(argument):
            names = [argument]
        elif glob.has_magic(argument):
            names = glob.glob(argument, recursive=True)
        else:
            raise CorpusError(f"shards {argument} do not exist; make them with bin/preprocess shards")
        if not names:
            where = f"directory {argument} holds" if os.path.isdir(argument) else f"pattern {argument!r} matches"
            raise CorpusError(f"{where} no {kind} ({pattern}); make them with bin/preprocess shards")
        for name in sorted(names):
            found.setdefault(os.path.realpath(name), name)
    if not found:
        raise CorpusError(f"no {kind} given; make them with bin/preprocess shards")
    return list(found.values())


def _check_set(files: Sequence[ShardFile]) -> None:
    """Check that ``files`` are all the shards of one set, without duplicates.

    Raises:
        CorpusError: They are not.
    """
    first = files[0]
    for file in files:
        if file.header.vocabulary_sha256 != first.header.vocabulary_sha256:
            raise CorpusError(
                f"shards {first.path} and {file.path} were made with different vocabularies; make one set of shards"
            )
        if file.header.num_shards != first.header.num_shards or file.header.set_sha256 != first.header.set_sha256:
            raise CorpusError(
                f"shards {first.path} and {file.path} belong to different sets; give the shards of one set"
            )
    by_index: dict[int, str] = {}
    for file in files:
        if file.header.shard_index in by_index:
            raise CorpusError(
                f"{by_index[file.header.shard_index]} and {file.path} are the same shard; remove one of them"
            )
        by_index[file.header.shard_index] = file.path
    missing = [index for index in range(first.header.num_shards) if index not in by_index]
    if missing:
        raise CorpusError(
            f"{len(missing)} of the {first.header.num_shards} {first.header.split} shards of {first.path} are missing, "
            f"the first is shard {missing[0]}; give all shards, or make the set again"
        )
