"""``bin/export``: write a saved model in a format of other programs (``elmo``, ``word2vec`` or ``huggingface``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lapse_elmo.config.trained_model import ExportConfig, parse_export
from lapse_elmo.export import elmo, huggingface, word2vec
from lapse_elmo.mpi.world import World
from lapse_elmo.trained.opening import open_together
from lapse_elmo.trained.stored import StoredModel


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Run ``bin/export``. One rank is enough; further ranks help to verify the checkpoint."""
    options = parse_export(argv)
    world = enter()
    output = Path(options.output)
    refuse = {"elmo": elmo.refuse, "word2vec": word2vec.refuse, "huggingface": huggingface.refuse}[options.format]
    world.agree(lambda: refuse(output, options.overwrite))
    stored = open_together(options.model, options.vocab, world)
    lines = world.agree(lambda: write_export(stored, output, options))
    if world.rank == 0:
        print("\n".join(lines))


def write_export(stored: StoredModel, output: Path, options: ExportConfig) -> list[str]:
    """Write the files.

    Returns:
        Lines about the export to print for the user.

    Raises:
        OutputError: If the files cannot be written.
    """
    write = {"elmo": elmo.write, "word2vec": word2vec.write, "huggingface": huggingface.write}[options.format]
    return write(stored, output, options.overwrite)
