"""A saved model, opened to be used: evaluated, exported, or asked for vectors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from lapse_elmo.checkpoint.files import restore
from lapse_elmo.checkpoint.folder import find
from lapse_elmo.checkpoint.manifest import (
    Manifest,
    check_files,
    config_of,
    read_manifest,
    require_vocabulary,
    vocabulary_path,
)
from lapse_elmo.config.training import Config, ServerConfig
from lapse_elmo.corpus.vocabulary import VocabularyFile
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters


@dataclass(frozen=True)
class SavedModel:
    """A whole checkpoint, the config that it was trained with (but for the server) and its vocabulary."""

    path: Path
    manifest: Manifest
    config: Config
    vocabulary: VocabularyFile

    @classmethod
    def open(cls, model: str, vocab: str, world: World) -> SavedModel:
        """Collective: find and verify a checkpoint; the ranks share the reading of its files.

        :param model: a run's folder, which stands for its newest checkpoint, or a checkpoint.
        :param vocab: its vocabulary file; empty for the run's own.
        :raises CheckpointError, CorpusError: on every rank, if it is not whole or the vocabulary is another's.
        """
        path = world.agree(lambda: find(Path(model)))
        manifest = world.agree(lambda: read_manifest(path))
        world.together(lambda: check_files(path, manifest, world.rank, world.size))
        config = world.agree(lambda: config_of(manifest, path))
        config = dataclasses.replace(config, server=ServerConfig())  # whatever kept the rows when they were trained
        vocabulary = world.agree(lambda: VocabularyFile.check(vocab or vocabulary_path(path, config)))
        world.agree(lambda: require_vocabulary(manifest, vocabulary, path))
        return cls(path, manifest, config, vocabulary)

    def parameters(self, world: World, device: torch.device) -> Parameters:
        """Collective: its parameters in a server of the world's ranks, and the model in evaluation mode."""
        parameters = Parameters(self.config, self.vocabulary.size, world, device)
        restore(self.path, self.manifest, parameters, world)
        parameters.model.eval()
        return parameters
