"""Initial values of a new run: random, those of another model (``--init-from``), or given word vectors.

With ``--init-from`` the LSTM is copied from the model. ``<S>``, ``</S>``, ``<UNK>`` and the words of both vocabularies
start with the model's rows of both tables. Other words of the run's vocabulary start as in any run: the embedding drawn
from N(0, 1), the softmax row from N(0, 1/D), its bias at the log probability of the log-uniform law. Other words of the
model are left out. The optimizers' state starts at its initial values, or with ``--init-accumulators kept`` at those of
the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from lapse_elmo.checkpoint import SavedTable
from lapse_elmo.checkpoint.manifest import DENSE
from lapse_elmo.checkpoint.restoring import saved_name
from lapse_elmo.config.training import Config
from lapse_elmo.corpus.files import H5_ERRORS
from lapse_elmo.corpus.vocabulary import UNKNOWN, Vocabulary, VocabularyFile
from lapse_elmo.corpus.word_vectors import read_word_vectors
from lapse_elmo.errors import CheckpointError, ConfigError
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import PARAMETERS, TRAINED, Parameters
from lapse_elmo.tables import RowTable
from lapse_elmo.trained.opening import open_together
from lapse_elmo.trained.stored import StoredModel, Table

_CHUNK_ROWS = 16384  # rows per call of the server
_SIZES = ("projection_size", "cell_size", "num_layers", "context")
# Steps of the model that a run with its optimizer's state counts: Adam's moments have less than 0.1 % of their initial
# bias left after so many. More of them would make the averages of the parameters, whose window grows with the steps,
# consist of the model's own values for longer than the run may last.
_UNBIASED_STEPS = 7_000


def initialise(parameters: Parameters, config: Config, file: VocabularyFile, world: World) -> list[str]:
    """Set the initial values of a new run (collective).

    Returns:
        Lines for the log that report where the values come from.

    Raises:
        CheckpointError: On every rank, if the model of --init-from cannot be read or has other sizes.
        CorpusError: On every rank, if the file of --init-embedding has no word vectors of the run's size.
    """
    given = config.initial
    if given.init_from:
        vocabulary = world.together(file.load)
        stored = open_together(given.init_from, "", world)
        world.together(lambda: _require_same_sizes(stored, config))
        return _from_model(stored, parameters, vocabulary, given.init_accumulators)
    parameters.initialise()
    if given.init_embedding:
        # Rank 0 alone: the file may have gigabytes, and 2,048 ranks would read it no faster than one.
        line = world.agree(lambda: _from_vectors(Path(given.init_embedding), parameters, file.load()))
        parameters.sync_parameters()
        return [line]
    return []


def _require_same_sizes(stored: StoredModel, config: Config) -> None:
    for name in _SIZES:
        theirs, ours = getattr(stored.options, name), getattr(config.model, name)
        if theirs != ours:
            raise CheckpointError(
                f"--init-from {stored.path}: its {name.replace('_', ' ')} is {theirs}, this run's is {ours}: give "
                f"--{name.replace('_', '-')} {theirs}"
            )


def _from_model(
    stored: StoredModel, parameters: Parameters, vocabulary: Vocabulary, init_accumulators: str
) -> list[str]:
    kept = init_accumulators == "kept"
    source = source_rows(stored.vocabulary, vocabulary)
    if parameters.writes_dense:
        with torch.no_grad():
            for name, parameter in parameters.model.named_parameters():
                parameter.copy_(torch.from_numpy(np.array(stored.dense[name], np.float32)))
        if parameters.dense_optimizer.averages is not None:
            parameters.dense_optimizer.averages.restart()
    parameters.initialise()
    tables = [(parameters.embedding, stored.embedding), (parameters.softmax, stored.softmax)]
    for table, theirs in tables:
        if theirs is not None:
            for rows, start in _shared(table, theirs, source, parameters.world, kept):
                table.server.set(table.segment.keys(rows), start)
    if kept:
        parameters.world.together(lambda: _keep_dense_state(stored.path / DENSE, parameters))
    parameters.sync_parameters()
    shared = int((source[UNKNOWN:] >= 0).sum())
    new, left_out = (len(words.words) - shared for words in (vocabulary, stored.vocabulary))
    lines = [
        f"--init-from {stored.path} ({stored.kind}): {shared:,} of {len(vocabulary.words):,} words start with its "
        f"rows, {new:,} are new, {left_out:,} of its words are left out; accumulators {init_accumulators}"
    ]
    if stored.softmax is None:
        lines.append("--init-from: the model has no softmax; it starts as in any run")
    if stored.boundaries != parameters.config.data.boundaries:
        lines.append(f"--init-from: the model was trained with{'' if stored.boundaries else 'out'} boundaries")
    return lines


def source_rows(theirs: Vocabulary, ours: Vocabulary) -> np.ndarray:
    """Return, for each class (V,) of ``ours``, the class of the same word in ``theirs``; -1 if there is none."""
    found = np.array(theirs.encode(ours.words), np.int64) - 1
    found[found == UNKNOWN - 1] = -1
    return np.concatenate([np.arange(UNKNOWN), found])


def _shared(
    table: RowTable, theirs: Table, source: np.ndarray, world: World, kept: bool
) -> Iterator[tuple[np.ndarray, Tensor | np.ndarray]]:
    """Yield chunks of this worker's rows that the model has: row numbers (n,) and initial rows (n, row_width)."""
    if kept and not isinstance(theirs, SavedTable):
        raise ConfigError("--init-accumulators kept: only runs and checkpoints have accumulators; give fresh")
    for number, first in enumerate(range(0, table.segment.num_rows, _CHUNK_ROWS)):
        rows = np.arange(first, min(first + _CHUNK_ROWS, table.segment.num_rows))
        rows = rows[source[rows] >= 0]
        if number % world.size == world.rank and rows.size:
            if kept:
                assert isinstance(theirs, SavedTable)
                yield rows, table.restored(theirs.rows(source[rows]))
            else:
                yield rows, table.initial_rows(torch.from_numpy(theirs.weights(source[rows])))


def _keep_dense_state(path: Path, parameters: Parameters) -> None:
    """Set the state of the dense parameters' optimizer to the one that a checkpoint has."""
    if parameters.dense_table is not None:
        raise ConfigError("--init-accumulators kept needs --dense allreduce: with ps the server has them")
    try:
        with h5py.File(path, "r") as file:
            for name, tensor in parameters.dense_tensors().items():
                saved = saved_name(name, file, parameters.dense_optimizer)
                if saved is None or name.startswith((PARAMETERS, TRAINED)):
                    continue
                if saved not in file:
                    kind = parameters.config.dense_optimizer
                    raise ConfigError(
                        f"--init-accumulators kept: {path} has no state of --dense-optimizer {kind}: give the one that "
                        "the model was trained with, or fresh"
                    )
                if not parameters.sets_dense(tensor):  # another rank of the node reads it
                    continue
                values = file[saved][()]
                if tensor is parameters.dense_optimizer.num_steps:  # which Adagrad counts for its averages alone
                    adam = parameters.config.dense_optimizer == "adam"
                    values = np.minimum(values, _UNBIASED_STEPS if adam else 0)
                parameters.set_dense(tensor, values)
    except H5_ERRORS as error:
        raise CheckpointError(f"cannot read the optimizer's state in {path}: {error}") from None


def _from_vectors(path: Path, parameters: Parameters, vocabulary: Vocabulary) -> str:
    """Set the rows of the words for which ``path`` has vectors, on all nodes; return a line for the log."""
    progress, table = parameters.world.progress, parameters.embedding
    known = set(vocabulary.words)
    rows: list[int] = []
    vectors: list[np.ndarray] = []
    found = set[int]()

    def put() -> None:
        distinct = dict(zip(rows, vectors, strict=True))  # the last vector of a repeated word wins
        weights = torch.from_numpy(np.stack(list(distinct.values())).astype(np.float32))
        table.server.set(table.segment.keys(np.array(list(distinct), np.int64)), table.initial_rows(weights))
        found.update(distinct)
        rows.clear()
        vectors.clear()

    for word, vector in progress.counted(read_word_vectors(path, table.size)):
        if word in known:
            rows.append(vocabulary.encode([word])[0] - 1)
            vectors.append(vector)
            if len(rows) == _CHUNK_ROWS:
                put()
    if rows:
        put()
    return f"--init-embedding: {len(found):,} of {len(vocabulary.words):,} words start with given vectors"
