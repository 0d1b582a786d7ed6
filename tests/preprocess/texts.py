"""Small texts, and commands run alone in this process."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

from lapse_elmo.config.preprocessing import ShardsOptions, VocabOptions
from lapse_elmo.mpi.world import solo
from preprocess.shards import make_shards
from preprocess.vocab import make_vocabulary

_SENTENCE = "the of a ship sails over cold water while gulls cry above its old wooden deck and mast"
WORDS = _SENTENCE.split()


def sentences(count: int, start: int = 0) -> list[str]:
    """``count`` different sentences of 1 to 12 words."""
    return [
        " ".join(WORDS[(number * 7 + k * k) % len(WORDS)] for k in range(1 + number * 5 % 12))
        for number in range(start, start + count)
    ]


def write(path: Path, lines: Sequence[str]) -> Path:
    """A text file, gzip if its name says so."""
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def vocab(texts: Sequence[Path], output: Path, threshold: int = 1, **options: object) -> Path:
    """Run ``vocab``."""
    names = tuple(map(str, texts))
    make_vocabulary(VocabOptions(names, str(output), threshold, **options), solo())  # type: ignore[arg-type]
    return output


def shards(texts: Sequence[Path], heldout: Sequence[Path], vocabulary: Path, output: Path, **options: object) -> Path:
    """Run ``shards``."""
    train, held = tuple(map(str, texts)), tuple(map(str, heldout))
    make_shards(ShardsOptions(train, held, str(vocabulary), str(output), **options), solo())  # type: ignore[arg-type]
    return output


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below ``directory`` with its bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
