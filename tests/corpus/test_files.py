"""Outputs that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from lapse_elmo.corpus.hdf5 import Hdf5Output


def test_an_error_of_hdf5_itself_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only failed writes: without its last rows, the file must not count as complete."""

    def fail(*_: object) -> None:
        raise RuntimeError("cannot extend the index of chunks")

    with pytest.raises(OSError, match="index of chunks"), Hdf5Output(tmp_path / "out") as output:
        output.append("means", np.ones(3, np.float32))
        monkeypatch.setattr(h5py.Dataset, "resize", fail)
    with h5py.File(tmp_path / "out") as closed:
        assert closed["means"].shape == (0, 3)
