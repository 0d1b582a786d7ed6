"""Define the options of ``bin/train`` for initial values."""

from __future__ import annotations

from dataclasses import dataclass

from lapse_elmo.config.cli import option
from lapse_elmo.errors import ConfigError


@dataclass(frozen=True)
class InitialConfig:
    """Initial values, which are random by default: from another model, or from given word vectors."""

    init_from: str = option(
        "", metavar="MODEL",
        help="start a new run with the parameters of another model of the same sizes: a run, a checkpoint, an exported "
        "directory or a bilm-tf token model; corpus and vocabulary may differ",
    )
    init_accumulators: str = option(
        "fresh", choices=("fresh", "kept"),
        help="with --init-from a run or checkpoint, the optimizers' state (Adagrad's accumulators, Adam's moments): "
        "fresh, or kept (that of the model)",
    )
    init_embedding: str = option(
        "", metavar="FILE", help="word2vec file of initial word vectors, text or binary (.bin)"
    )

    def __post_init__(self) -> None:
        if self.init_from and self.init_embedding:
            raise ConfigError("--init-from and --init-embedding both set the initial word vectors; drop one of them")
