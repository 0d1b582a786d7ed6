"""The options of ``bin/train`` that say where initial values come from."""

from __future__ import annotations

from dataclasses import dataclass

from lapse_elmo.config.cli import option
from lapse_elmo.errors import ConfigError


@dataclass(frozen=True)
class InitialConfig:
    """Initial values: from another model, or from given word vectors (default: drawn)"""

    init_from: str = option(
        "", metavar="MODEL",
        help="start a new run with another model's parameters: a run, a checkpoint, an exported folder or a bilm-tf "
        "token model, of the same sizes; the corpus and the vocabulary may be others",
    )
    init_accumulators: str = option(
        "fresh", choices=("fresh", "kept"),
        help="Adagrad's accumulators with --init-from a run or checkpoint: as at any start, or the model's",
    )
    init_embedding: str = option(
        "", metavar="FILE", help="start from the word vectors of a word2vec file, text or binary (.bin)"
    )

    def __post_init__(self) -> None:
        if self.init_from and self.init_embedding:
            raise ConfigError("--init-from and --init-embedding both say what the word vectors start as; drop one")
