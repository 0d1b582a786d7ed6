"""The functions that the formats ``elmo`` and ``huggingface`` share, which write a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lapse_elmo.corpus.files import refuse_existing
from lapse_elmo.errors import OutputError


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


def encode_json(content: dict[str, Any]) -> bytes:
    """Return the bytes of a JSON file, in a form that people can read, too."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"
