"""Run text through a model on all ranks, in rounds: each rank computes a window of lines, rank 0 writes all results.

Every rank reads the whole text and computes every ``world.size``-th window of lines; rank 0 receives the results one
line at a time, in the order of the lines. Memory depends on the size of a window (lapse_elmo.trained.sentences; rank 0
holds the lines of a window for each rank), not on the size of the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

from lapse_elmo.corpus.text import read_blocks, split_into_chunks
from lapse_elmo.errors import CorpusError
from lapse_elmo.handover import hand_to_first
from lapse_elmo.metrics.terminal import stderr_is_terminal
from lapse_elmo.mpi.world import World
from lapse_elmo.trained.sentences import windows

T = TypeVar("T")

LONGEST = 10_000  # words per line: longer lines are rejected, since their vectors would not fit into memory


def run_rounds(
    texts: Sequence[str], batch_size: int, world: World, compute: Callable[[list[list[str]]], list[T]],
    write: Callable[[int, list[str], T], None],
) -> tuple[int, int]:
    """Call ``write(number, words, result)`` on rank 0 for each line of the texts, numbered from 0 (collective).

    Args:
        texts: Paths of the texts.
        batch_size: Lines per batch of the model.
        world: The world.
        compute: Returns the results of a window of lines, in their order.
        write: Writes the result of one line.

    Returns:
        The numbers of lines and words.

    Raises:
        UserError: On every rank, for a file that is not text, and any UserError that ``write`` raises.
    """
    source = windows(read_lines(texts), batch_size)
    num_lines = num_words = 0
    silent = world.rank != 0 or not stderr_is_terminal()
    with tqdm(unit=" lines", disable=silent, leave=False) as progress:
        while (taken := world.together(lambda: take_windows(source, world))).num_lines:
            results = compute(taken.windows[0]) if taken.windows else []
            lines = enumerate(itertools.chain.from_iterable(taken.windows), num_lines)

            def take(result: T, lines: Iterator[tuple[int, list[str]]] = lines) -> None:
                number, words = next(lines)
                write(number, words, result)

            hand_to_first(world, results, take)
            num_lines += taken.num_lines
            num_words += taken.num_words
            progress.update(taken.num_lines)
    return num_lines, num_words


@dataclass(frozen=True)
class Taken:
    """The lines of one round.

    Attributes:
        windows: The windows of lines that this rank needs, its own first.
        num_lines: Lines of all ranks.
        num_words: Words of all ranks.
    """

    windows: list[list[list[str]]]
    num_lines: int
    num_words: int


def take_windows(source: Iterator[list[list[str]]], world: World) -> Taken:
    """Take a window of lines for each rank, and keep those that this rank needs.

    Rank 0 needs all, since it writes all results; the others need their own. The windows of 2,048 ranks take 2 GB.
    """
    kept, num_lines, num_words = [], 0, 0
    for rank, window in enumerate(itertools.islice(source, world.size)):
        if world.rank in (0, rank):
            kept.append(window)
        num_lines += len(window)
        num_words += sum(map(len, window))
    return Taken(kept, num_lines, num_words)


def read_lines(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the words of each line of the texts.

    Raises:
        CorpusError: For a line of more than ``LONGEST`` words, and for a file that is not text.
    """
    number = 0
    for chunk in split_into_chunks(texts):
        for block in read_blocks(chunk):
            for line in block.decode().removesuffix("\n").split("\n"):
                words = line.split()
                if len(words) > LONGEST:
                    raise CorpusError(
                        f"{chunk.path} has a line of {len(words):,} words (number {number} of all, from 0): cut it "
                        f"into sentences, of at most {LONGEST:,} words"
                    )
                yield words
                number += 1
