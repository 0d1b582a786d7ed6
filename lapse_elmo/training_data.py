"""The input of a run: the vocabulary, and the training and held-out shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lapse_elmo.config.training import DEFAULT_SHARDS, DEFAULT_VOCAB, Config, DataConfig
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.corpus.vocabulary import VocabularyFile
from lapse_elmo.errors import ConfigError, CorpusError
from lapse_elmo.mpi.world import World


@dataclass(frozen=True)
class TrainingData:
    """The vocabulary and both splits of the shards of a run."""

    vocabulary: VocabularyFile
    train: ShardSet
    heldout: ShardSet

    def names(self) -> dict[str, str]:
        """Return the hash that identifies each set of shards, by purpose."""
        return {"training": self.train.set_sha256, "held-out": self.heldout.set_sha256}


def open_training_data(config: Config, world: World) -> TrainingData:
    """Open the vocabulary and both splits of the shards, and check that they fit each other (collective).

    Raises:
        CorpusError: If a file is missing, damaged, or belongs to another vocabulary.
        ConfigError: If there are fewer training sentences than ranks, or the held-out sentences have no targets.
    """
    data = config.data
    world.progress.enter("start, opening the corpus")
    world.agree(lambda: _check_defaults(data))
    vocabulary = world.agree(lambda: VocabularyFile.check(data.vocab))
    train = ShardSet.open_on_all(world, data.shards, "train", vocabulary)
    heldout = ShardSet.open_on_all(world, data.heldout or data.shards, "heldout", vocabulary)
    if train.num_sentences < world.size * config.training.accumulate:
        parts = f" with {config.training.accumulate} parts each" if config.training.accumulate > 1 else ""
        raise ConfigError(
            f"{train.num_sentences} training sentences cannot be shared by {world.size} ranks{parts}: start fewer "
            f"ranks{' or lower --accumulate' if parts else ''}"
        ).on_every_rank()
    if not data.boundaries and (data.max_length == 1 or heldout.num_tokens == heldout.num_sentences):
        raise ConfigError(
            "the held-out sentences have no targets: those of one token need --boundaries"
        ).on_every_rank()
    return TrainingData(vocabulary, train, heldout)


def _check_defaults(data: DataConfig) -> None:
    """Say how to get a first corpus where the default paths have none."""
    if data.shards == DEFAULT_SHARDS and not Path(data.shards).exists():
        raise CorpusError(
            f"there are no shards at {DEFAULT_SHARDS} yet: run 'make train' for a first corpus, or bin/preprocess "
            "vocab and bin/preprocess shards on your text (docs/getting-started.md), or give others with --shards "
            "and --vocab"
        )
    if data.vocab == DEFAULT_VOCAB and data.shards != DEFAULT_SHARDS and not Path(data.vocab).exists():
        raise CorpusError(
            f"there is no vocabulary at {DEFAULT_VOCAB}: give the vocabulary of {data.shards} with --vocab"
        )


def sentence_tokens(config: Config, shards: ShardSet) -> float:
    """Return how many words a sentence has on average, but not more than --max-length."""
    return min(shards.num_tokens / max(shards.num_sentences, 1), config.data.max_length)


def sentence_targets(config: Config, shards: ShardSet) -> float:
    """Return how many targets, of both directions, a sentence has on average; at least 1."""
    length = sentence_tokens(config, shards)
    return max(2 * (length + (1 if config.data.boundaries else -1)), 1.0)
