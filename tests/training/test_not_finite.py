"""A loss or gradient that is not finite ends the run before anything is pushed, and says where it came from."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lapse_elmo import evaluate
from lapse_elmo.config.training import Config, parse_train
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.cursor import batch_streams
from lapse_elmo.errors import CheckpointError, TrainingError
from lapse_elmo.mpi.world import solo
from lapse_elmo.parameters import Parameters
from lapse_elmo.perplexity import Perplexity
from lapse_elmo.schedule import Rates
from lapse_elmo.step import TrainingStep
from lapse_elmo.step_report import Vote
from lapse_elmo.training_data import sentence_targets
from tests.training.conftest import Drive
from tests.training.corpora import TINY, Prepared, evaluate_alone, train_alone


@pytest.mark.parametrize("dense", ["allreduce", "ps"])
def test_nothing_is_pushed(small: Prepared, dense: str) -> None:
    config: Config = parse_train([*small.options, *TINY, "--dense", dense])
    world, cpu = solo(), torch.device("cpu")
    with ShardSet.open(small.shards) as shards:
        parameters = Parameters(config, shards.vocabulary_size, world, cpu)
        parameters.initialise()
        batch = next(batch_streams(config, world, shards)[0].epoch(0))
        row = batch.input_rows[5:6]
        size = parameters.embedding.segment.row_width
        parameters.server.set(parameters.embedding.segment.keys(row), np.full((1, size), np.nan, np.float32))
        step = TrainingStep(config, world, parameters, cpu, sentence_targets(config, shards), Vote)

        def state() -> list[torch.Tensor]:
            tables = [table.read(0, table.segment.num_rows) for table in parameters.tables]
            return [*tables, *(tensor.clone() for tensor in parameters.dense_tensors().values())]

        parameters.sync_parameters()
        before = state()
        with pytest.raises(TrainingError, match=r"loss is not finite at step 7 \(sentences \d+, .*nothing was pushed"):
            step(step.announce([batch], 0), 7, Rates(0.2, 0.002))
        for old, new in zip(before, state(), strict=True):
            assert torch.equal(old, new) or (old.isnan().any() and torch.equal(old.nan_to_num(), new.nan_to_num()))
        assert parameters.server.clock == 0
        parameters.server.close()


def test_the_rank_is_named(small: Prepared, drive: Drive, tmp_path: Path) -> None:
    """A bad rate spoils all ranks; a bad gradient of one rank must be found there, also when gradients are summed."""
    common = [*small.options, *TINY, "--max-steps", "4"]
    poisoned = r"^\[rank 1/2 \S+\] the gradient norm is not finite at step 1 \(sentences "
    cases = {
        "rate": ("train", ["--learning-rate", "1e38"], r"^\[rank 0/2 \S+\] the (loss|gradient norm) is not finite at"),
        "summed": ("poisoned", [], poisoned),
        "server": ("poisoned", ["--dense", "ps"], poisoned),
    }
    programs = [(p, [*common, *options, "--run-dir", str(tmp_path / n)]) for n, (p, options, _) in cases.items()]
    for (name, (_, _, says)), outcome in zip(cases.items(), drive(2, programs, timeout=60), strict=True):
        assert [rank["error"] for rank in outcome] == ["TrainingError"] * 2, (name, outcome)
        assert all(rank["everywhere"] and re.search(says, rank["message"]) for rank in outcome), (name, outcome)
        assert not list((tmp_path / name / "checkpoints").iterdir())


def test_a_model_that_has_diverged_is_not_saved(small: Prepared, tmp_path: Path) -> None:
    """A model whose first push was harmful is not saved: the evaluation finds it, before any loss does."""
    with pytest.raises(TrainingError, match="held-out perplexity is not finite at step 1"):
        train_alone(small, tmp_path / "run", "--max-steps", "1", "--learning-rate", "1e38")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_an_evaluation_that_is_not_finite_is_an_error(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "1")
    monkeypatch.setattr(evaluate, "measure_perplexity", lambda *_: Perplexity(3.0, math.nan, 2))
    with pytest.raises(CheckpointError, match="cannot predict words: some of its numbers are not finite"):
        evaluate_alone(run_dir, tmp_path / "result.json")
    assert not (tmp_path / "result.json").exists()
