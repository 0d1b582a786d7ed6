"""``vocab``: count the words of texts and write those frequent enough, most frequent first.

The order is by count, and among equal counts by code points (which is also the order of the UTF-8 bytes), so a corpus
gives the same file whatever the number of ranks and the order of its files. A rank holds its own counts; rank 0 adds up
those of the others one after another.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from lapse_elmo.config.preprocessing import VocabOptions
from lapse_elmo.corpus.text import Part, cut_into_parts, find_texts, read_blocks, share
from lapse_elmo.corpus.vocabulary import SPECIAL, Vocabulary
from lapse_elmo.errors import CorpusError
from lapse_elmo.world import World
from preprocess.progress import bar, say
from preprocess.staging import Staging


def make_vocabulary(options: VocabOptions, world: World) -> None:
    """Run the command on every rank of ``world``.

    :raises CorpusError, OutputError: on all ranks.
    """
    started = time.perf_counter()
    parts = world.agree(lambda: cut_into_parts(find_texts(options.texts)))
    mine = [parts[number] for number in share(parts, world.size)[world.rank]]
    with Staging(world, options.output, options.overwrite) as staging:
        counts: Counter[str] = Counter()
        with bar(world, sum(part.size for part in mine), "B", "counting") as progress:
            with_words = set().union(*staging.phase(lambda: _count(mine, counts, progress.update, staging.check)))
        world.agree(lambda: _check_words(parts, with_words))
        _add_up(counts, world)

        def save() -> str:
            if world.rank != 0:
                return ""
            vocabulary = _choose(counts, options)
            vocabulary.save(staging.directory / "vocabulary")
            return _summary(vocabulary, counts)

        summary = staging.phase(save)[0]
        staging.publish("vocabulary")
    say(world, f"{options.output}: {summary}; {time.perf_counter() - started:.1f} s")


def _count(
    parts: Sequence[Part], counts: Counter[str], advance: Callable[[int], object], check: Callable[[], None]
) -> set[str]:
    """Add the words of ``parts`` to ``counts``; returns the paths of the parts that have any."""
    with_words = set()
    for part in parts:
        for block in read_blocks(part):
            words = block.text.split()
            if words:
                with_words.add(part.path)
            counts.update(words)
            advance(block.num_bytes)
            check()
    return with_words


def _check_words(parts: Sequence[Part], with_words: set[str]) -> None:
    for part in parts:
        if part.path not in with_words:
            raise CorpusError(f"text {part.path} has no words; expected one sentence a line")


def _summary(vocabulary: Vocabulary, counts: Counter[str]) -> str:
    num_tokens = counts.total()
    unknown = num_tokens - sum(map(counts.__getitem__, vocabulary.words))
    return (
        f"{len(vocabulary.words):,} words ({vocabulary.size:,} classes) of {len(counts):,} distinct ones, "
        f"{num_tokens:,} tokens, {unknown / num_tokens:.2%} unknown"
    )


def _add_up(counts: Counter[str], world: World) -> None:
    """Bring all counts to rank 0, those of one rank at a time."""
    for root in range(1, world.size):
        others = world.bcast(counts if world.rank == root else None, root)
        if world.rank == 0 and others is not None:
            counts.update(others)
        if world.rank == root:
            counts.clear()


def _choose(counts: Counter[str], options: VocabOptions) -> Vocabulary:
    words = [word for word, count in counts.items() if count >= options.threshold and word not in SPECIAL]
    if not words:
        best = max((count for word, count in counts.items() if word not in SPECIAL), default=0)
        raise CorpusError(
            f"no word occurs {options.threshold} times (the most frequent one {best}); lower --threshold"
        )
    words.sort(key=lambda word: (-counts[word], word))
    return Vocabulary.from_words(words[: options.max_size])
