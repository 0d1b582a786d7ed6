"""Directories that lack a file, and sentences at the limits: one line, or a sensible result."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

import lapse_elmo
from lapse_elmo import export
from lapse_elmo.errors import UserError
from lapse_elmo.mpi.world import solo
from lapse_elmo.trained import Totals
from tests.training.corpora import Prepared, checkpoints, train_alone

NEEDED = {
    "elmo": ("options.json", "weights.hdf5", "vocab.txt"), "huggingface": ("config.json", "model.safetensors"),
    "checkpoint": (
        "manifest.json", "dense.h5", "table-embedding-00000-of-00001.h5", "table-softmax-00000-of-00001.h5"
    ),
}


@pytest.fixture(scope="module")
def models(small: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    run = train_alone(small, folder / "run", "--max-steps", "2")
    for kind in ("elmo", "huggingface"):
        export.main([str(run), "--output", str(folder / kind), "--format", kind], solo)
    bare = train_alone(small, folder / "bare", "--max-steps", "2", "--no-boundaries")
    exports = {kind: folder / kind for kind in ("elmo", "huggingface")}
    return {"checkpoint": checkpoints(run)[-1], "bare": bare, **exports}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NEEDED.items() for name in names])
def test_a_file_that_is_missing(models: dict[str, Path], kind: str, name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(models[kind], tmp_path / "model")
    assert lapse_elmo.load(folder, vocab=vocabulary(models, kind)).embed(["w00"])[0].shape == (3, 1, 32)
    (folder / name).unlink()
    with pytest.raises(UserError) as caught:
        lapse_elmo.load(folder, vocab=vocabulary(models, kind)).embed(["w00"])
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(folder) in message and name in message, message


def vocabulary(models: dict[str, Path], kind: str) -> str:
    """Return the vocabulary of a copied checkpoint, whose own is in the directory of its run."""
    return str(models["checkpoint"].parents[1] / "vocab.txt") if kind == "checkpoint" else ""


def test_sentences_of_one_word_and_of_10_000(models: dict[str, Path]) -> None:
    trained = lapse_elmo.load(models["elmo"])
    words = ["w00", "unheard", "w07", "w01"] * 2_500
    one, many = trained.score(["w00", words], batch_size=2)
    assert one.words == ("w00",) and np.isfinite([*one.forward, *one.backward, one.end, one.begin]).all()
    assert many.unknown.sum() == 2_500 and np.isfinite(many.forward).all() and np.isfinite(many.backward).all()
    np.testing.assert_allclose(many.forward[:8], trained.score([words[:8]])[0].forward, atol=1e-5)
    (found,) = trained.fill("w00", 0, count=1)
    assert 0 < found.probability < 1 and found.forward > 0 and found.backward > 0


def test_a_model_with_a_number_that_is_not_finite_does_not_score(models: dict[str, Path], tmp_path: Path) -> None:
    """Otherwise the words that it cannot predict would be left out of the perplexity."""
    folder = shutil.copytree(models["elmo"], tmp_path / "model")
    with h5py.File(folder / "weights.hdf5", "r+") as file:
        file["embedding"][lapse_elmo.load(folder).vocabulary.encode(["w01"])[0] - 1, 0] = np.nan
    trained = lapse_elmo.load(folder)
    (fine,) = trained.score(["w00 w07"])
    assert np.isfinite([*fine.forward, *fine.backward, fine.begin, fine.end]).all()
    with pytest.raises(UserError, match=r"model cannot predict words: some of its numbers are not finite$"):
        trained.score(["w00 w07", "w07 w01 w00"])


def test_a_model_without_boundaries_and_one_word(models: dict[str, Path]) -> None:
    """Nothing predicts the word: no target, and no word that would fit better than another."""
    trained, totals = lapse_elmo.load(models["bare"]), Totals()
    (one,) = trained.score(["w00"])
    totals.add(one)
    assert np.isnan([*one.forward, *one.backward]).all() and totals.num_targets == 0 and np.isnan(totals.perplexity)
    assert trained.embed(["w00"])[0].shape == (3, 1, 32) and trained.embed([""])[0].shape == (3, 0, 32)
    every = trained.fill("w00", 0, count=100)
    assert len({found.probability for found in every}) == 1 and np.isnan(every[0].forward)


def test_a_checkpoint_without_its_vocabulary(small: Prepared, tmp_path: Path) -> None:
    """As one that was copied from its run's directory to another machine."""
    vocab = Path(shutil.copy(small.vocab, tmp_path / "words.txt"))
    run = train_alone(small, tmp_path / "run", "--max-steps", "1", "--vocab", str(vocab))
    copied = shutil.copytree(checkpoints(run)[0], tmp_path / "elsewhere" / "step")
    assert lapse_elmo.load(copied).vocabulary.size == 43
    vocab.unlink()
    with pytest.raises(UserError, match=r"step has no vocabulary: neither .*vocab.txt nor .*words.txt exists; give it"):
        lapse_elmo.load(copied)
    assert lapse_elmo.load(copied, vocab=small.vocab).vocabulary.size == 43
