"""Checks that several export formats share."""

from __future__ import annotations

from pathlib import Path

from lapse_elmo.corpus.files import refuse_existing
from lapse_elmo.errors import CheckpointError, OutputError
from lapse_elmo.trained.stored import StoredModel, Table


def refuse_foreign(folder: Path, overwrite: bool, names: set[str]) -> None:
    """Refuse an output directory that must not be replaced.

    Args:
        folder: The output directory.
        overwrite: Whether an earlier export may be replaced.
        names: The names of an export's files.

    Raises:
        OutputError: If the directory exists without ``overwrite``, is a file, or holds files that are not of an export.
    """
    refuse_existing(folder, overwrite)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: give the name of a directory as --output")
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(present - names)
    if others:
        raise OutputError(f"{folder} holds other files ({others[0]}), which would be lost: give another --output")


def softmax_of(stored: StoredModel) -> Table:
    """Return the model's softmax table.

    Raises:
        CheckpointError: If the model came without a softmax.
    """
    if stored.softmax is None:
        raise CheckpointError(f"{stored.path} came without a softmax, which this format requires: export from the run")
    return stored.softmax
