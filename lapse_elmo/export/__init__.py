"""``bin/export``: write a saved model in a format of other programs (``elmo``, ``word2vec`` or ``huggingface``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lapse_elmo.config.trained_model import parse_export
from lapse_elmo.export import elmo, huggingface, word2vec
from lapse_elmo.mpi.world import World
from lapse_elmo.trained.opening import open_together

_FORMATS = {
    "elmo": (elmo.refuse, elmo.write), "word2vec": (word2vec.refuse, word2vec.write),
    "huggingface": (huggingface.refuse, huggingface.write),
}


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Run ``bin/export``. One rank is enough; further ranks help to verify the checkpoint."""
    options = parse_export(argv)
    world = enter()
    output, (refuse, write) = Path(options.output), _FORMATS[options.format]
    world.agree(lambda: refuse(output, options.overwrite))
    stored = open_together(options.model, options.vocab, world)
    lines = world.agree(lambda: write(stored, output, options.overwrite))
    if world.rank == 0:
        print("\n".join(lines))
