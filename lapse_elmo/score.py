"""``bin/score``: the surprisal of every word of a text, and totals that can be compared between vocabularies.

The table has one line per word, tab-separated, after a line of column names: ``sentence`` and ``position`` (both from
0), ``word``, ``forward_bits`` and ``backward_bits`` (surprisal, -log2 p(word | words before) and -log2 p(word | words
after)), and ``unknown``, which is 1 for a word that is not in the vocabulary: its surprisal is then that of ``<UNK>``.
A value is ``nan`` where nothing predicts the word (in a model without boundaries). The totals include the ends of
sentences, and bits per character include the cost of spelling the unknown words
(:class:`~lapse_elmo.trained.scores.Totals`).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import IO

from lapse_elmo.config.trained_model import ScoreConfig, parse_score
from lapse_elmo.corpus.files import atomic_output, atomic_write, flush_file, refuse_existing, write_failed
from lapse_elmo.corpus.text import find_texts
from lapse_elmo.devices import choose_device
from lapse_elmo.errors import CorpusError
from lapse_elmo.mpi.world import World
from lapse_elmo.rounds import run_rounds
from lapse_elmo.trained import SentenceScore, Totals, TrainedModel
from lapse_elmo.trained.opening import open_together

HEADER = "sentence\tposition\tword\tforward_bits\tbackward_bits\tunknown\n"


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Parse, open the model, score the lines of the texts, and write the table and the totals."""
    options = parse_score(argv)
    world = enter()
    for output in filter(None, (options.output, options.totals)):
        world.agree(lambda output=output: refuse_existing(output, options.overwrite))  # type: ignore[misc]
    texts = world.agree(lambda: find_texts(options.texts))
    stored = open_together(options.model, options.vocab, world)
    model = TrainedModel(stored, choose_device(options.devices, world).device)
    start = time.perf_counter()
    totals = Totals()
    with contextlib.ExitStack() as stack:
        table = world.together(lambda: _open(options, stack) if options.output and not world.rank else None)

        def write(number: int, words: list[str], score: SentenceScore) -> None:
            totals.add(score)
            if table is not None:
                try:
                    table.write("".join(lines_of(number, score)))
                except OSError as error:
                    raise write_failed(options.output, error) from None

        run_rounds(
            texts, options.batch_size, world, lambda window: model.score_window(window, options.batch_size), write
        )
        world.agree(lambda: require_targets(totals))
        world.agree(stack.close)
    if options.totals:
        text = json.dumps({"model": str(stored.path), **summary(totals)}, indent=1).encode() + b"\n"
        world.agree(lambda: atomic_write(options.totals, text, options.overwrite))
    if world.rank == 0:
        speed = totals.num_words / (time.perf_counter() - start)
        for name, value in summary(totals).items():
            print(f"{name:<29}{value:,.4f}" if isinstance(value, float) else f"{name:<29}{value:,}")
        print(f"{'speed':<29}{speed:,.0f} words/s")


def _open(options: ScoreConfig, stack: contextlib.ExitStack) -> IO[str]:
    hidden = stack.enter_context(atomic_output(options.output, options.overwrite))
    try:
        file = stack.enter_context(open(hidden, "w", encoding="utf-8", newline="\n"))  # noqa: SIM115 (the stack closes it)
        stack.callback(flush_file, file)
        file.write(HEADER)
    except OSError as error:
        raise write_failed(options.output, error) from None
    return file


def require_targets(totals: Totals) -> None:
    """Check that something was predicted, so that there is a perplexity.

    Raises:
        CorpusError: If not.
    """
    if not totals.num_targets:
        raise CorpusError("the text has no words that the model predicts: there is nothing to score")


def lines_of(number: int, score: SentenceScore) -> list[str]:
    """Return the table lines of one sentence."""
    columns = zip(score.words, score.forward_bits, score.backward_bits, score.unknown, strict=True)
    return [
        f"{number}\t{position}\t{word}\t{forward:.4f}\t{backward:.4f}\t{int(unknown)}\n"
        for position, (word, forward, backward, unknown) in enumerate(columns)
    ]


def summary(totals: Totals) -> dict[str, float | int]:
    """Return the totals by name."""
    return {
        "sentences": totals.num_sentences, "words": totals.num_words, "unknown_words": totals.num_unknown,
        "unknown_share": totals.unknown_share, "characters": totals.num_characters,
        "targets_a_direction": totals.num_targets, "forward_perplexity": totals.forward_perplexity,
        "backward_perplexity": totals.backward_perplexity, "perplexity": totals.perplexity,
        "bits_per_character": totals.bits_per_character,
        "spelling_bits_per_character": totals.spelling_bits_per_character,
    }
