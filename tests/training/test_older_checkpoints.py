"""Checkpoints of earlier formats load: ``version_2`` holds two that lapse-elmo 0.1.0 wrote.

``two`` is of 2 ranks at step 5, within the first epoch of 203 sentences; ``one`` is that of 1 rank which resumed from
it, at step 8, with what the two had left of the epoch as its share.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

import lapse_elmo
from lapse_elmo.checkpoint.manifest import MANIFEST, encode, rank_file
from lapse_elmo.corpus.shards import WorkerPart
from tests.training.conftest import Drive
from tests.training.corpora import (
    TINY,
    Prepared,
    checkpoints,
    records,
    saved_arrays,
    train_alone,
)
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


@pytest.mark.parametrize("run_dir", ["one"], indirect=True)
def test_a_model_whose_run_resumed_with_options_that_are_now_refused(run_dir: Path) -> None:
    """It resumed without the --init-from of its start, and with samples that did not repeat."""
    path = checkpoints(run_dir)[0] / MANIFEST
    manifest = json.loads(path.read_bytes())
    del manifest["sha256"]
    manifest["config"]["initial"] |= {"init_accumulators": "kept", "init_from": ""}
    manifest["config"]["softmax"]["sampling_scheme"] = "local"
    path.write_bytes(encode(manifest))
    assert lapse_elmo.load(run_dir).stored.embedding.weights(np.arange(43)).shape == (43, 4)


@pytest.mark.parametrize("run_dir", LEFT, indirect=True)
def test_a_run_of_version_2_resumes_alone(
    small: Prepared, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sentence that was left of the epoch is trained once, then those of the second epoch."""
    before = saved_arrays(checkpoints(run_dir)[0])
    recorded = Recorded(monkeypatch)
    step = int(checkpoints(run_dir)[0].name[5:])
    train_alone(small, run_dir, *OPTIONS, "--epochs", "1", "--learning-rate", "1e-30", "--dense-optimizer", "adagrad")
    assert len(set(recorded.sentences)) == len(recorded.sentences) == LEFT[run_dir.name]
    assert records(run_dir, "epoch")[-1]["step"] == step + -(-LEFT[run_dir.name] // 8)
    after = saved_arrays(checkpoints(run_dir)[-1])
    assert before.keys() < after.keys() and len(before) > 10
    for name in ("embedding", "softmax"):  # at this rate weights stay
        np.testing.assert_array_equal(after[name][:, :4], before[name][:, :4])
    for name in (name for name in before if name.startswith("parameters/")):
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
        np.testing.assert_array_equal(after[f"trained_{name}"], before[name], err_msg=name)


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


def as_version_2(path: Path) -> None:
    """Rewrite a checkpoint of one node as lapse-elmo 0.1.0 would have written it."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    size, arrays = manifest["world_size"], saved_arrays(path)
    with h5py.File(path / "sentences.h5", "r") as file:
        epoch, left = (np.flatnonzero(np.unpackbits(file[name][:])) for name in ("epoch", "left"))
    for rank in range(size):
        with h5py.File(path / rank_file(rank, size), "w") as file:
            for name in ("embedding", "softmax"):
                rows = np.arange(len(arrays[name]))[rank::size]
                file[f"tables/{name}/rows"], file[f"tables/{name}/values"] = rows, arrays[name][rows]
            part = WorkerPart.of(epoch.size, rank, size)
            own = epoch[part.first : part.end]
            for name, numbers in (("part", own), ("left", np.intersect1d(own, left))):
                bits = np.zeros(numbers[-1] - own[0] + 1, bool)
                bits[numbers - own[0]] = True
                file[f"sentences/{name}"] = np.packbits(bits)
                file[f"sentences/{name}"].attrs["first"] = own[0]
    for name in ("sentences.h5", *(name for name in manifest["files"] if name.startswith("table-"))):
        (path / name).unlink()
    files = {file.name: file.read_bytes() for file in path.glob("*.h5")}
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    del manifest["sha256"], manifest["num_nodes"]
    (path / "manifest.json").write_bytes(encode({**manifest, "version": 2, "files": entries}))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_version_2_resumes_to_the_bit(small: Prepared, drive: Drive, tmp_path: Path, num_ranks: int) -> None:
    """The run resumes with the batches of an uninterrupted run; ``two`` cannot show it: its bits vary by processor."""
    options = [*small.options, *OPTIONS, "--save-every-steps", "5"]
    whole, run_dir = ([*options, "--run-dir", str(tmp_path / name)] for name in ("whole", "run"))
    drive(num_ranks, [("train", whole), ("train", [*run_dir, "--max-steps", "5"])])
    as_version_2(checkpoints(tmp_path / "run")[-1])
    (results,) = drive(num_ranks, [("train", run_dir)])
    assert [result["error"] for result in results] == [None] * num_ranks
    ends = [saved_arrays(checkpoints(tmp_path / name)[-1]) for name in ("whole", "run")]
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) > 10
    for name, values in ends[0].items():
        np.testing.assert_array_equal(values, ends[1][name], err_msg=name)
