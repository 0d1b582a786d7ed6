"""Open a checkpoint as a model, for evaluation, export or embedding."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from lapse_elmo.checkpoint.checksums import OpenFiles, verified
from lapse_elmo.checkpoint.folder import find
from lapse_elmo.checkpoint.manifest import Manifest, config_of, require_vocabulary, vocabulary_path
from lapse_elmo.checkpoint.restoring import restore
from lapse_elmo.config.server import ServerConfig
from lapse_elmo.config.training import Config
from lapse_elmo.corpus.vocabulary import VocabularyFile
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters


@dataclass(frozen=True)
class SavedModel:
    """A verified checkpoint with its vocabulary and its config, without the options that only training needs.

    Its files stay open from their verification until :meth:`parameters` has read them.
    """

    path: Path
    files: OpenFiles
    manifest: Manifest
    config: Config
    vocabulary: VocabularyFile

    @classmethod
    def open(cls, model: str, vocab: str, world: World) -> SavedModel:
        """Find and verify a checkpoint (collective); each rank reads a part of its files.

        Args:
            model: The directory of a run, which stands for its newest checkpoint, or of a checkpoint.
            vocab: The vocabulary file; ``""`` for the run's own.
            world: The ranks.

        Raises:
            CheckpointError: On every rank: the checkpoint is damaged, or the vocabulary is another one.
            CorpusError: On every rank: the vocabulary cannot be read.
        """
        path = world.agree(lambda: find(Path(model)))
        files = OpenFiles(path)
        manifest = verified(files, world)
        config = world.agree(lambda: config_of(manifest, path))
        # Independent of the server used in training, and of options that only some kinds of ranks can train with.
        training = dataclasses.replace(config.training, local_steps=1, node_sums="fp32")
        config = dataclasses.replace(config, server=ServerConfig(), training=training)
        vocabulary = world.agree(lambda: VocabularyFile.check(vocab or vocabulary_path(path, config)))
        world.agree(lambda: require_vocabulary(manifest, vocabulary, path))
        return cls(path, files, manifest, config, vocabulary)

    def parameters(self, world: World, device: torch.device) -> Parameters:
        """Load the parameters into a new server, with the model in evaluation mode (collective); call it once."""
        parameters = Parameters(self.config, self.vocabulary.size, world, device)
        restore(self.files, self.manifest, parameters, world)
        parameters.use_averages()
        parameters.model.eval()
        return parameters
