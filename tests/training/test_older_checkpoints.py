"""Checkpoints of earlier formats load: ``version_2`` holds two that lapse-elmo 0.1.0 wrote.

``two`` is of 2 ranks at step 5, within the first epoch of 203 sentences; ``one`` is that of 1 rank which resumed from
it, at step 8, with what the two had left of the epoch as its share.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import lapse_elmo
from tests.training.conftest import Drive
from tests.training.corpora import TINY, Prepared, checkpoints, records, saved_arrays, train_alone
from tests.training.test_resume import Recorded

SAVED = Path(__file__).with_name("version_2")
LEFT = {"two": 203 - 2 * 5 * 8, "one": 203 - 2 * 5 * 8 - 3 * 8}
OPTIONS = (*TINY, "--projection-size", "4", "--cell-size", "8", "--sync", "--epochs", "2", "--batch-size", "8")


@pytest.fixture
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return shutil.copytree(SAVED / request.param, tmp_path / request.param)


@pytest.mark.parametrize("run_dir", LEFT, indirect=True)
def test_a_model_of_version_2(run_dir: Path) -> None:
    arrays = saved_arrays(checkpoints(run_dir)[0])
    model = lapse_elmo.load(run_dir)
    rows = np.arange(43)
    np.testing.assert_array_equal(model.stored.embedding.weights(rows), arrays["embedding"][:, :4])
    assert model.stored.softmax is not None
    np.testing.assert_array_equal(model.stored.softmax.weights(rows), arrays["softmax"][:, :5])


@pytest.mark.parametrize("run_dir", LEFT, indirect=True)
def test_a_run_of_version_2_resumes_alone(
    small: Prepared, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sentence that was left of the epoch is trained once, then those of the second epoch."""
    before = saved_arrays(checkpoints(run_dir)[0])
    recorded = Recorded(monkeypatch)
    step = int(checkpoints(run_dir)[0].name[5:])
    train_alone(small, run_dir, *OPTIONS, "--epochs", "1", "--learning-rate", "1e-30")
    assert len(set(recorded.sentences)) == len(recorded.sentences) == LEFT[run_dir.name]
    assert records(run_dir, "epoch")[-1]["step"] == step + -(-LEFT[run_dir.name] // 8)
    after = saved_arrays(checkpoints(run_dir)[-1])
    assert before.keys() == after.keys() and len(before) > 10
    for name in ("embedding", "softmax"):  # at this rate weights stay
        np.testing.assert_array_equal(after[name][:, :4], before[name][:, :4])
    for name in (name for name in before if name.startswith("parameters/")):
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


@pytest.mark.parametrize("run_dir", LEFT, indirect=True)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_run_of_version_2_resumes_on_ranks(small: Prepared, drive: Drive, run_dir: Path, num_ranks: int) -> None:
    step, ranks_left = int(checkpoints(run_dir)[0].name[5:]), -(-LEFT[run_dir.name] // num_ranks)
    argv = [*small.options, *OPTIONS, "--epochs", "1", "--run-dir", str(run_dir)]
    (results,) = drive(num_ranks, [("train", argv)])
    assert [result["error"] for result in results] == [None] * num_ranks
    (epoch,) = records(run_dir, "epoch")
    assert epoch["train/epoch_tokens"] == sum(len(sentence.split()) for sentence in small.train)
    if (run_dir.name, num_ranks) != ("two", 2):
        assert epoch["step"] == step + -(-ranks_left // 8)
