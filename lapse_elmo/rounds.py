"""Text through a model on all ranks, round after round: each rank computes a window of lines, rank 0 writes them all.

Every rank reads the text and computes every size-th window of its lines; rank 0 gets the results one line at a time,
in the order of the lines. Memory depends on the window (lapse_elmo.trained.sentences), not on the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from lapse_elmo.corpus.text import cut_into_parts, read_blocks
from lapse_elmo.errors import CorpusError
from lapse_elmo.handover import hand_to_first
from lapse_elmo.metrics.terminal import stderr_is_terminal
from lapse_elmo.mpi.world import World
from lapse_elmo.trained.sentences import windows

T = TypeVar("T")

LONGEST = 10_000  # words of a line: a longer one is no sentence, and its vectors would not fit a machine's memory


def run_rounds(
    texts: Sequence[str], batch_size: int, world: World, compute: Callable[[list[list[str]]], list[T]],
    write: Callable[[int, list[str], T], None],
) -> tuple[int, int]:
    """Collective: ``write(number, words, result)`` on rank 0 for each line of the texts, numbered from 0 on.

    :param compute: the results of a window of lines, in their order.
    :return: the numbers of lines and words.
    :raises UserError: on every rank, for what is no text, and for whatever ``write`` raises.
    """
    source = windows(read_lines(texts), batch_size)
    num_lines = num_words = 0
    silent = world.rank != 0 or not stderr_is_terminal()
    with tqdm(unit=" lines", disable=silent, leave=False) as progress:
        while taken := world.together(lambda: list(itertools.islice(source, world.size))):
            mine = taken[world.rank] if world.rank < len(taken) else []
            results = compute(mine) if mine else []
            lines = enumerate(itertools.chain.from_iterable(taken), num_lines)

            def take(result: T, lines: Iterator[tuple[int, list[str]]] = lines) -> None:
                number, words = next(lines)
                write(number, words, result)

            hand_to_first(world, results, take)
            num_lines += sum(map(len, taken))
            num_words += sum(len(words) for window in taken for words in window)
            progress.update(sum(map(len, taken)))
    return num_lines, num_words


def read_lines(texts: Sequence[str]) -> Iterator[list[str]]:
    """The words of each line of the texts.

    :raises CorpusError: for a line of more than ``LONGEST`` words, and for whatever is no text.
    """
    number = 0
    for part in cut_into_parts(texts):
        for block in read_blocks(part):
            for line in block.decode().removesuffix("\n").split("\n"):
                words = line.split()
                if len(words) > LONGEST:
                    raise CorpusError(
                        f"{part.path} has a line of {len(words):,} words (number {number} of all, from 0): cut it into "
                        f"sentences, of at most {LONGEST:,} words"
                    )
                yield words
                number += 1
