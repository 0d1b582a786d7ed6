"""A machine may crash at any time: a checkpoint of the final name must be whole on the disk, and its name must last."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from lapse_elmo.checkpoint import files
from tests.training.corpora import Prepared, checkpoints, train_alone


class Disk:
    """Notes which files and directories have been flushed since they were last written, and renames of checkpoints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self._fsync, self._pwrite, self._replace = os.fsync, os.pwrite, os.replace
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "pwrite", self.pwrite)
        monkeypatch.setattr(os, "replace", self.replace)

    def fsync(self, handle: int) -> None:
        self._fsync(handle)
        self.done.append(name_of(handle))

    def pwrite(self, handle: int, data: memoryview, offset: int) -> int:
        self.done = [name for name in self.done if name != name_of(handle)]
        return self._pwrite(handle, data, offset)

    def replace(self, source: Path, target: Path) -> None:
        if Path(target).name.startswith("step-"):
            self.done.append("rename")
        self._replace(source, target)


def name_of(handle: int) -> str:
    return Path(os.readlink(f"/proc/self/fd/{handle}")).name


def test_all_of_a_checkpoint_is_on_the_disk_before_it_gets_its_name(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "1")
    (folder,) = checkpoints(run_dir)
    assert disk.done.count("rename") == 1
    renamed = disk.done.index("rename")
    files_and_folder = {path.name for path in folder.iterdir()} | {f".{folder.name}.partial"}
    assert len(files_and_folder) == 6 and files_and_folder <= set(disk.done[:renamed])
    assert "checkpoints" in disk.done[renamed:]
    disk.done.clear()  # a rank that is not the first of its node writes only its share of the rows
    files.write_parts(folder / "dense.h5", [(0, np.zeros(3, np.uint8))], lambda: False)
    assert disk.done == ["dense.h5"]
