"""What a run counts and orders goes on after very many steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lapse_elmo import checkpoint, run_folder
from lapse_elmo.config.cli import as_tables
from lapse_elmo.config.training import parse_train
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.cursor import Cursor
from lapse_elmo.errors import CheckpointError
from lapse_elmo.mpi.world import solo
from lapse_elmo.parameters import Parameters
from tests.training.corpora import TINY, Prepared, save_once


def test_steps_are_counted_beyond_what_float32_counts(small: Prepared, tmp_path: Path) -> None:
    config, many = parse_train([*small.options, *TINY]), 2**24 + 1
    parameters = Parameters(config, 43, solo(), torch.device("cpu"))
    parameters.initialise()
    optimizer = parameters.dense_optimizer
    optimizer.num_steps.fill_(many - 1)
    optimizer.step([torch.zeros_like(parameter) for parameter in optimizer.parameters])
    with ShardSet.open(small.shards) as shards:
        entries = {
            "vocabulary_sha256": "v", "num_classes": 43, "corpus": {"training": "t", "held-out": "h"}, "results": {},
            "state": {}, "config": as_tables(config),
        }
        path = save_once(tmp_path, parameters, Cursor(config, solo(), shards), entries, solo())
    optimizer.num_steps.zero_()
    checkpoint.restore(checkpoint.OpenFiles(path), checkpoint.read_manifest(path), parameters, solo())
    assert int(optimizer.num_steps) == many
    parameters.server.close()


def test_the_order_of_checkpoints_is_that_of_their_steps(tmp_path: Path) -> None:
    oldest, older, newest = (checkpoint.path_of(tmp_path, step) for step in (99_999_998, 99_999_999, 100_000_000))
    for folder in (oldest, older, newest):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    assert checkpoint.candidates(tmp_path) == [newest, older, oldest]
    assert checkpoint.find(tmp_path) == newest
    with pytest.raises(CheckpointError, match=r"after step-99999999, the newest is step-100000000: give another"):
        run_folder._refuse_later(older, tmp_path, overwrite=False)
    saver = run_folder.open_saver(tmp_path, solo(), run_folder.ResumePoint(older, {"best": None}), num_newest=3)
    assert saver._kept == [oldest, older]
