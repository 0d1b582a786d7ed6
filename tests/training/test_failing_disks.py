"""File systems that fail or hang for a while, and files that change: no model is lost, and no error waits."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lapse_elmo.checkpoint import folder


def test_a_checkpoint_whose_replacement_gets_no_name_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have the same step, as when a run ends with an evaluation that a signal had put off."""
    final = folder.path_of(tmp_path, 3)
    for path in (final, folder.partial_of(final)):
        path.mkdir(parents=True)
        (path / path.name).touch()
    rename = Path.rename

    def fail(source: Path, target: Path) -> Path:
        if source == folder.partial_of(final):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        folder.publish(folder.partial_of(final), final)
    assert folder.candidates(tmp_path) == [final] and os.listdir(final) == [final.name]
