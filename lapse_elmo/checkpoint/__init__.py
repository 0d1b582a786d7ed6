"""Checkpoints: written atomically by all ranks, readable by any number of ranks.

A checkpoint is the directory ``RUN/checkpoints/step-00000123``:

``table-embedding-00000-of-00002.h5``, ``table-softmax-...``
    The rows of a table that one node owned; all ranks of the node write the file together. ``values`` (n, row width)
    float32 are the rows, each ``[weights | accumulators]`` with one accumulator per weight or per row (the config's
    ``row_accumulators``); ``rows`` (n,) int64 are their row numbers. Every row is in exactly one file. With
    ``--dense ps`` there is a third table, ``dense``.
``dense.h5``
    ``parameters/<name>`` and the optimizer's state: ``first_moments/<name>``, ``second_moments/<name>`` and
    ``num_steps`` with Adam, ``accumulators/<name>`` with Adagrad. Written by rank 0; they are equal on all ranks.
    With ``--dense-average``, ``parameters`` are the averages, the number of steps is saved with Adagrad and SGD too,
    and training resumes from ``trained_parameters/<name>``, the values after the last step.
``sentences.h5``
    In mid-epoch only: ``epoch`` and ``left``, the sentences of the epoch (all, unless the run was resumed by another
    number of ranks within it) and those of them still to be trained, as bits (numpy.packbits) by sentence number. The
    shares of the ranks follow each other, so they need no places of their own. Written by rank 0.
``manifest.json``
    Written last: format version, step, epoch, numbers of ranks and nodes, the resolved config, the corpus, library
    versions, results so far, name and size of every other file, sizes and SHA-256 of its pieces in their order, and
    ``sha256``, its own checksum.

This is version 3. Version 2 is still read: each rank wrote one file ``rank-00000-of-00002.h5`` with its share of the
rows (``tables/<name>/values`` and ``tables/<name>/rows``) and of the sentences (``sentences/part`` and
``sentences/left``, bits whose first is sentence number ``first``, an attribute), and a file had one checksum.

The directory is written under a hidden name, flushed and renamed, so that a directory of this name is complete.
``RUN/best`` is a symbolic link to the checkpoint with the lowest held-out perplexity.
"""

from lapse_elmo.checkpoint.checksums import OpenFiles, check_files, verified
from lapse_elmo.checkpoint.folder import BEST, FOLDER, candidates, find, order_of, path_of, prune, step_of
from lapse_elmo.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    config_of,
    read_manifest,
    require_vocabulary,
    vocabulary_path,
)
from lapse_elmo.checkpoint.model import SavedModel
from lapse_elmo.checkpoint.restoring import restore
from lapse_elmo.checkpoint.saved_rows import SavedTable
from lapse_elmo.checkpoint.saver import Saver
from lapse_elmo.checkpoint.sentences import read_cursor

__all__ = [
    "BEST", "FOLDER", "MANIFEST", "Manifest", "OpenFiles", "SavedModel", "SavedTable",
    "Saver", "candidates", "check_files",
    "config_of", "find", "order_of", "path_of", "prune", "read_cursor", "read_manifest", "require_vocabulary",
    "restore", "step_of", "verified", "vocabulary_path",
]
