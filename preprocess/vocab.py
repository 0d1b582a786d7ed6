"""``vocab``: count the words of text and write the frequent ones, most frequent first.

Words of equal count are ordered by code point (which is also the order of the UTF-8 bytes), so a corpus gives the same
file for any number of ranks and any order of its files. Each rank counts its own chunks; the counts are added up pair
by pair in a tree, whose root is rank 0.

A run that was killed starts from scratch. A rank has one table of words for all its chunks. To save complete chunks,
every run would need a table for each chunk and would have to add them up, only to save some seconds per gigabyte after
a kill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lapse_elmo.config.preprocessing import VocabOptions
from lapse_elmo.corpus.text import (
    TextChunk,
    assign,
    find_texts,
    read_blocks,
    refuse_text,
    require_unchanged,
    split_into_chunks,
    text_states,
)
from lapse_elmo.corpus.vocabulary import SPECIAL, Vocabulary
from lapse_elmo.corpus.words import WordCounter, fallback_reason, most_frequent, new_word_counter
from lapse_elmo.errors import CorpusError
from lapse_elmo.inputs import MOST_VOCABULARY_BYTES
from lapse_elmo.mpi.world import World

from .progress import print_once, progress_bar
from .staging import Staging


def make_vocabulary(options: VocabOptions, world: World) -> None:
    """Run the command (collective).

    Raises:
        CorpusError: On all ranks: a text cannot be used, or too few or too many words are frequent enough.
        ConfigError: On all ranks: the output is one of the texts.
        OutputError: On all ranks: the output exists or cannot be written.
    """
    started = time.perf_counter()
    before, chunks = world.agree(lambda: _find_chunks(options))
    mine = [chunks[number] for number in assign([chunk.work for chunk in chunks], world.size)[world.rank]]
    with Staging(world, options.output, options.overwrite) as staging:
        counter = new_word_counter()
        with progress_bar(world, sum(chunk.size for chunk in mine), "B", "counting") as progress:
            with_words = set().union(*staging.phase(lambda: _count(mine, counter, progress.update, staging.check)))
        world.agree(lambda: require_unchanged(before))
        world.agree(lambda: _check_words(chunks, with_words))
        world.merge(counter.frequent, counter.add)  # from here on, rank 0 has the counts of all ranks

        def save() -> str:
            return _save(counter, options, staging.directory / "vocabulary") if world.rank == 0 else ""

        summary = staging.phase(save)[0]
        staging.publish("vocabulary")
    if reason := fallback_reason():
        print_once(world, reason)
    print_once(world, f"{options.output}: {summary}; {time.perf_counter() - started:.1f} s")


def _find_chunks(options: VocabOptions) -> tuple[dict[str, tuple[int, int]], list[TextChunk]]:
    """Return the chunks of the texts, and what :func:`require_unchanged` compares."""
    texts = find_texts(options.texts)
    refuse_text(options.output, texts, "the output")  # --overwrite would replace a text, or count an old vocabulary
    return text_states(texts), split_into_chunks(texts)


def _count(
    chunks: Sequence[TextChunk], counter: WordCounter, advance: Callable[[int], object], check: Callable[[], None]
) -> set[str]:
    """Count the words of ``chunks``; returns the paths of the texts that have words."""
    with_words = set()
    for chunk in chunks:
        for block in read_blocks(chunk):
            if counter.count(block):
                with_words.add(chunk.path)
            advance(block.num_bytes)
            check()
    return with_words


def _check_words(chunks: Sequence[TextChunk], with_words: set[str]) -> None:
    for chunk in chunks:
        if chunk.path not in with_words:
            raise CorpusError(f"text {chunk.path} has no words; expected one sentence per line")


def _save(counter: WordCounter, options: VocabOptions, path: Path) -> str:
    """Write the vocabulary; returns a summary line."""
    # Only these leave the table: most distinct words of a corpus are rare.
    frequent = counter.frequent(options.threshold)
    special = [token.encode() for token in SPECIAL]
    words, num_known = most_frequent(frequent, special, options.max_size)
    if not words:  # look at all words, to say which threshold would do
        every = counter.frequent()
        most = max(
            (count for word, count in zip(every.words(), every.counts.tolist(), strict=True) if word not in special),
            default=0,
        )
        raise CorpusError(
            f"no word occurs {options.threshold} times; the most frequent one occurs {most} times: lower --threshold"
        )
    data = b"\n".join([*special, *words, b""])
    if len(data) > MOST_VOCABULARY_BYTES:  # no command would read it
        raise CorpusError(
            f"{len(words):,} words occur {options.threshold} times, which is a file of {len(data) >> 20:,} MiB; a "
            f"vocabulary has at most {MOST_VOCABULARY_BYTES >> 20:,} MiB: raise --threshold or give --max-size"
        )
    vocabulary = Vocabulary(data)
    vocabulary.save(path)
    num_distinct, num_tokens = counter.totals()
    return (
        f"{len(words):,} words ({vocabulary.size:,} classes) of {num_distinct:,} distinct ones, "
        f"{num_tokens:,} tokens, {(num_tokens - num_known) / num_tokens:.2%} unknown"
    )
