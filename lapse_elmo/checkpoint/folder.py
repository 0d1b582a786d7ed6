"""List, find, publish and remove the checkpoints of a run."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from pathlib import Path

from lapse_elmo.checkpoint.manifest import MANIFEST, cannot_read
from lapse_elmo.corpus.files import flush_path, replace
from lapse_elmo.errors import CheckpointError

FOLDER, BEST = "checkpoints", "best"


def path_of(run_dir: Path, step: int) -> Path:
    """Return the path of the checkpoint of ``step``."""
    return run_dir / FOLDER / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of the checkpoint at ``path``."""
    return int(path.name.removeprefix("step-"))


def partial_of(final: Path) -> Path:
    """Return the hidden name under which the checkpoint ``final`` is written."""
    return final.with_name(f".{final.name}.partial")


def _unused_name(final: Path) -> Path:
    """Return a hidden name for the checkpoint ``final`` while it is removed."""
    for number in itertools.count():
        hidden = final.with_name(f".{final.name}.removed{number or ''}")
        shutil.rmtree(hidden, ignore_errors=True)  # of a removal that was killed
        # On NFS, files that other processes have mapped stay in it under names of their own until they end.
        if not hidden.exists():
            break
    return hidden


def candidates(run_dir: Path) -> list[Path]:
    """Return the paths of the run's checkpoints, newest first. They may be damaged.

    Raises:
        CheckpointError: The directory cannot be read: a run that seems to have none would be replaced.
    """
    folder = run_dir / FOLDER
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise cannot_read(folder, error) from None
    return sorted((folder / name for name in names if name.startswith("step-")), key=order_of, reverse=True)


def order_of(path: Path) -> tuple[int, str]:
    """Return what puts the paths of a run's checkpoints in the order of their steps."""
    return len(path.name), path.name  # names alone would put step 100,000,000, of nine digits, before all others


def find(path: Path) -> Path:
    """Return the checkpoint at ``path``, or the newest one of the run at ``path``.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give the directory of a run or of a checkpoint")
    if (path / MANIFEST).is_file():
        return path.resolve()
    whole = [step for step in candidates(path) if (step / MANIFEST).is_file()]
    if not whole:
        raise CheckpointError(
            f"{path} holds no checkpoint, expected {FOLDER}/step-*/{MANIFEST}: give the directory of a run that has "
            "saved one, or of a checkpoint"
        )
    return whole[0]


def publish(partial: Path, final: Path) -> None:
    """Rename the complete checkpoint ``partial`` to ``final``, replacing an older one, and flush it to the disk."""
    flush_path(partial)  # before the rename: after a crash, a directory of the final name must be complete
    older = _unused_name(final)
    replace(partial, final, older)
    flush_path(final.parent)  # so that the rename itself survives a crash
    shutil.rmtree(older, ignore_errors=True)  # last: it takes long, and a kill meanwhile must leave one of them


def mark_best(run_dir: Path, best: Path) -> None:
    """Make ``RUN/best`` a symbolic link to the checkpoint ``best``."""
    temporary = run_dir / f".{BEST}.tmp"
    with contextlib.suppress(OSError):  # some file systems have no links; the manifests name the best one too
        temporary.unlink(missing_ok=True)
        os.symlink(os.path.join(FOLDER, best.name), temporary)  # relative, so that the run may be moved
        os.replace(temporary, run_dir / BEST)


def prune(run_dir: Path, keep: set[Path]) -> None:
    """Remove all checkpoints except those in ``keep``, and the remains of interrupted saves."""
    folder = run_dir / FOLDER
    names = {path.name for path in keep}
    for path in folder.iterdir() if folder.is_dir() else []:
        if path.name not in names:
            remove(path)


def remove(folder: Path) -> None:
    """Remove a directory atomically: it is renamed to a hidden name first, so that no reader sees half of it."""
    with contextlib.suppress(OSError):
        hidden = folder if folder.name.startswith(".") else folder.rename(_unused_name(folder))
        shutil.rmtree(hidden, ignore_errors=True)
