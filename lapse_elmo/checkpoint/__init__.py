"""Saved models: written whole or not at all, by all ranks, readable in any world size.

A checkpoint is a folder ``RUN/checkpoints/step-00000123``:

``rank-00000-of-00002.h5``
    written by one rank each. For every table ``tables/<name>/values`` (n, row width) float32, the rows that this rank
    saved, each ``[weights | accumulators]`` with an accumulator for each weight or one for the row (the config's
    ``row_accumulators``), and ``tables/<name>/rows`` (n,) int64, their numbers; every row is in exactly one of the
    files. Within an epoch also ``sentences/part`` and ``sentences/left``: this worker's share of the epoch's sentences
    and what is left of it, as bits (numpy.packbits) that count from attribute ``first`` on.
``dense.h5``
    ``parameters/<name>`` and, with Adagrad, ``accumulators/<name>``. Written by rank 0; all ranks hold the same.
``manifest.json``
    written last: format version, step, epoch, world size, the resolved config, what the model was trained on, library
    versions, results so far, name, size and SHA-256 of every other file, and ``sha256``, its own.

The folder is written under a hidden name, flushed and renamed, so a folder of this name is whole unless the disk
damages it. ``RUN/best`` is a link to the checkpoint with the lowest held-out perplexity.
"""

from lapse_elmo.checkpoint.files import restore, saved_cursor
from lapse_elmo.checkpoint.folder import BEST, FOLDER, candidates, clear, find, path_of
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
    "clear", "config_of", "find", "path_of", "read_manifest", "require_vocabulary", "restore", "save", "saved_cursor",
    "vocabulary_path",
]
