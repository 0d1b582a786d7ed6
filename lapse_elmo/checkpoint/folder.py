"""The folder of a run's checkpoints: which there are, which one is meant, and which ones go."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from lapse_elmo.checkpoint.manifest import MANIFEST
from lapse_elmo.corpus.files import sync_directory
from lapse_elmo.errors import CheckpointError

FOLDER, BEST = "checkpoints", "best"


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:08d}"


def partial_of(final: Path) -> Path:
    """The hidden name under which a checkpoint is written."""
    return final.with_name(f".{final.name}.partial")


def candidates(run_dir: Path) -> list[Path]:
    """The run's checkpoints, newest first; they are not looked into."""
    folder = run_dir / FOLDER
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def find(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest of the run it names."""
    if (path / MANIFEST).is_file():
        return path.resolve()
    whole = [step for step in candidates(path) if (step / MANIFEST).is_file()]
    if not whole:
        raise CheckpointError(
            f"{path} holds no saved model (expected {FOLDER}/step-*/{MANIFEST}): give the folder of a run that has "
            "saved one, or one of its checkpoints"
        )
    return whole[0]


def put(partial: Path, final: Path) -> None:
    """Give a written checkpoint its name, in place of an older one if need be. Flushed to the disk."""
    sync_directory(partial)
    if final.exists():
        remove(final)
    partial.rename(final)
    sync_directory(final.parent)


def mark_best(run_dir: Path, best: Path) -> None:
    """Let ``RUN/best`` be a link to ``best``."""
    temporary = run_dir / f".{BEST}.tmp"
    with contextlib.suppress(OSError):  # a file system without links: the manifests tell it too
        temporary.unlink(missing_ok=True)
        os.symlink(os.path.join(FOLDER, best.name), temporary)
        os.replace(temporary, run_dir / BEST)


def clear(run_dir: Path, keep: set[Path]) -> None:
    """Remove all checkpoints that are not in ``keep``, and what interrupted saves left behind."""
    folder = run_dir / FOLDER
    names = {path.name for path in keep}
    for path in folder.iterdir() if folder.is_dir() else []:
        if path.name not in names:
            remove(path)


def remove(folder: Path) -> None:
    """Remove a folder so that whoever looks at any instant sees it whole or not at all."""
    hidden = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.removed")
    with contextlib.suppress(OSError):
        if hidden != folder:
            shutil.rmtree(hidden, ignore_errors=True)
            folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
