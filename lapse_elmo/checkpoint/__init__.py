"""Checkpoints: written atomically by all ranks, readable by any number of ranks.

A checkpoint is the directory ``RUN/checkpoints/step-00000123``:

``rank-00000-of-00002.h5``
    Written by one rank each. For every table, ``tables/<name>/values`` (n, row width) float32 are the rows that this
    rank saved, each ``[weights | accumulators]`` with one accumulator per weight or per row (the config's
    ``row_accumulators``); ``tables/<name>/rows`` (n,) int64 are their row numbers. Every row is in exactly one file.
    In mid-epoch also ``sentences/part`` and ``sentences/left``: which sentences of the epoch are this worker's, and
    which of them are still to be trained, as bits (numpy.packbits) whose first is sentence number ``first`` (an
    attribute).
``dense.h5``
    ``parameters/<name>`` and, with Adagrad, ``accumulators/<name>``. Written by rank 0; they are equal on all ranks.
``manifest.json``
    Written last: format version, step, epoch, world size, the resolved config, the corpus, library versions, results
    so far, name, size and SHA-256 of every other file, and ``sha256``, its own checksum.

The directory is written under a hidden name, flushed and renamed, so that a directory of this name is complete.
``RUN/best`` is a symbolic link to the checkpoint with the lowest held-out perplexity.
"""

from lapse_elmo.checkpoint.files import read_cursor, restore
from lapse_elmo.checkpoint.folder import BEST, FOLDER, candidates, find, path_of, prune
from lapse_elmo.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    check_files,
    config_of,
    read_manifest,
    require_vocabulary,
    vocabulary_path,
)
from lapse_elmo.checkpoint.model import SavedModel
from lapse_elmo.checkpoint.saved_rows import SavedTable
from lapse_elmo.checkpoint.saver import Saver, save

__all__ = [
    "BEST", "FOLDER", "MANIFEST", "Manifest", "SavedModel", "SavedTable",
    "Saver", "candidates", "check_files",
    "config_of", "find", "path_of", "prune", "read_cursor", "read_manifest", "require_vocabulary", "restore", "save",
    "vocabulary_path",
]
