"""Outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from lapse_elmo.corpus.files import atomic_output
from lapse_elmo.corpus.hdf5 import Hdf5Output
from lapse_elmo.errors import OutputError


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_an_old_directory_comes_back_if_the_new_one_cannot_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = tmp_path / "out"
    path.mkdir()
    (path / "old").touch()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((OutputError, KeyboardInterrupt)), atomic_output(path, overwrite=True) as hidden:
        hidden.mkdir()
    assert [found.relative_to(tmp_path) for found in tmp_path.rglob("*")] == [Path("out"), Path("out/old")]


def test_an_old_directory_that_cannot_be_put_back_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a file server is lost for a moment: it has the old output under a hidden name, and nothing else."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def rename_once(path: Path, target: Path) -> None:
        monkeypatch.setattr(Path, "rename", fail)
        os.rename(path, target)

    path = tmp_path / "out"
    path.mkdir()
    (path / "old").touch()
    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(Path, "rename", rename_once)
    with pytest.raises(OutputError, match="Input/output error"), atomic_output(path, overwrite=True) as hidden:
        hidden.mkdir()
    kept = f".out.{os.getpid()}.old"
    assert [found.relative_to(tmp_path) for found in tmp_path.rglob("*")] == [Path(kept), Path(kept, "old")]


def test_a_link_to_a_directory_is_replaced_without_a_trace(tmp_path: Path) -> None:
    (target := tmp_path / "target").mkdir()
    (tmp_path / "out").symlink_to(target)
    with atomic_output(tmp_path / "out", overwrite=True) as hidden:
        hidden.mkdir()
    assert sorted(os.listdir(tmp_path)) == ["out", "target"] and not (tmp_path / "out").is_symlink()


def test_hdf5_files_have_the_same_bytes_however_an_array_is_written(tmp_path: Path) -> None:
    """Those of h5py's own classes: the files of all versions can be compared by checksum."""
    numbers = np.arange(24.0)
    arrays = {
        "0": numbers.astype(np.float32).reshape(2, 3, 4),
        "1": numbers.reshape(4, 6).T,
        "2": np.empty((3, 0, 8)),
        "cell/of/one/W": numbers[::2],
        "cell/of/one/B": numbers[:1],
        "cell/two": numbers,
    }
    with Hdf5Output(tmp_path / "at once") as at_once, Hdf5Output(tmp_path / "by rows") as by_rows:
        for name, array in arrays.items():
            at_once.write(name, array)
            by_rows.write_rows(name, array.shape, [(0, array)])
    assert (tmp_path / "at once").read_bytes() == (tmp_path / "by rows").read_bytes()
    with h5py.File(tmp_path / "at once") as file:
        for name, array in arrays.items():
            np.testing.assert_array_equal(file[name][()], array)


def test_an_error_of_hdf5_itself_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only failed writes: without its last rows, the file must not count as complete."""

    def fail(*_: object) -> None:
        raise RuntimeError("cannot extend the index of chunks")

    with pytest.raises(OSError, match="index of chunks"), Hdf5Output(tmp_path / "out") as output:
        output.append("means", np.ones(3, np.float32))
        monkeypatch.setattr(h5py.Dataset, "resize", fail)
    with h5py.File(tmp_path / "out") as closed:
        assert closed["means"].shape == (0, 3)


def test_what_a_killed_process_of_our_number_has_left_is_replaced(tmp_path: Path) -> None:
    (left := tmp_path / f".out.{os.getpid()}.tmp").mkdir()
    (left / "half").touch()
    with atomic_output(tmp_path / "out") as hidden:
        hidden.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]
