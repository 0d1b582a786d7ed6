"""``bin/nearest``: the nearest neighbours of words in a model's table. Runs as one process, without MPI."""

from __future__ import annotations

from collections.abc import Callable

from lapse_elmo.config.trained_model import parse_nearest
from lapse_elmo.mpi.world import World
from lapse_elmo.trained import load


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Parse, open the model, and print one line per word: the word, then its neighbours with their cosines."""
    options = parse_nearest(argv)
    model = load(options.model, vocab=options.vocab)
    for word in options.words:
        found = model.nearest(word, options.count, options.table)
        print(f"{word}: " + ", ".join(f"{neighbour} {cosine:.2f}" for neighbour, cosine in found))
