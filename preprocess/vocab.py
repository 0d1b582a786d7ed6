"""``vocab``: count the words of texts and write those frequent enough, most frequent first.

The order is by count, and among equal counts by code points (which is also the order of the UTF-8 bytes), so a corpus
gives the same file whatever the number of ranks and the order of its files. Each rank holds its own counts; rank 0 adds
those of the others, one rank at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lapse_elmo.config.preprocessing import VocabOptions
from lapse_elmo.corpus.text import Part, cut_into_parts, find_texts, read_blocks, share
from lapse_elmo.corpus.vocabulary import SPECIAL, Vocabulary
from lapse_elmo.corpus.words import Counts, most_frequent, new_counts, problem
from lapse_elmo.errors import CorpusError
from lapse_elmo.mpi.world import World

from .progress import bar, say
from .staging import Staging


def make_vocabulary(options: VocabOptions, world: World) -> None:
    """Run the command on every rank of ``world``.

    :raises CorpusError, OutputError: on all ranks.
    """
    started = time.perf_counter()
    parts = world.agree(lambda: cut_into_parts(find_texts(options.texts)))
    mine = [parts[number] for number in share(parts, world.size)[world.rank]]
    with Staging(world, options.output, options.overwrite) as staging:
        counts = new_counts()
        with bar(world, sum(part.size for part in mine), "B", "counting") as progress:
            with_words = set().union(*staging.phase(lambda: _count(mine, counts, progress.update, staging.check)))
        world.agree(lambda: _check_words(parts, with_words))
        counts = _add_up(counts, world)

        def save() -> str:
            return _save(counts, options, staging.directory / "vocabulary") if world.rank == 0 else ""

        summary = staging.phase(save)[0]
        staging.publish("vocabulary")
    if reason := problem():
        say(world, reason)
    say(world, f"{options.output}: {summary}; {time.perf_counter() - started:.1f} s")


def _count(
    parts: Sequence[Part], counts: Counts, advance: Callable[[int], object], check: Callable[[], None]
) -> set[str]:
    """Add the words of ``parts`` to ``counts``; returns the paths of the parts that have any."""
    with_words = set()
    for part in parts:
        for block in read_blocks(part):
            if counts.count(block):
                with_words.add(part.path)
            advance(block.num_bytes)
            check()
    return with_words


def _check_words(parts: Sequence[Part], with_words: set[str]) -> None:
    for part in parts:
        if part.path not in with_words:
            raise CorpusError(f"text {part.path} has no words; expected one sentence a line")


def _add_up(counts: Counts, world: World) -> Counts:
    """Bring all counts to rank 0, those of one rank at a time; what it returns elsewhere is empty."""
    total = counts if world.rank == 0 else new_counts()
    for root in range(1, world.size):
        words = world.bcast(counts.frequent() if world.rank == root else None, root)
        if world.rank == 0 and words is not None:
            total.add(words)
    return total


def _save(counts: Counts, options: VocabOptions, path: Path) -> str:
    """Write the vocabulary of ``counts``; returns a line about it."""
    frequent = counts.frequent(options.threshold)
    special = [token.encode() for token in SPECIAL]
    words, num_known = most_frequent(frequent, special, options.max_size)
    if not words:
        every = counts.frequent()
        most = max(
            (count for word, count in zip(every.words(), every.counts.tolist(), strict=True) if word not in special),
            default=0,
        )
        raise CorpusError(
            f"no word occurs {options.threshold} times (the most frequent one {most}); lower --threshold"
        )
    vocabulary = Vocabulary(b"\n".join([*special, *words, b""]))
    vocabulary.save(path)
    num_distinct, num_tokens = counts.totals()
    return (
        f"{len(words):,} words ({vocabulary.size:,} classes) of {num_distinct:,} distinct ones, "
        f"{num_tokens:,} tokens, {(num_tokens - num_known) / num_tokens:.2%} unknown"
    )
