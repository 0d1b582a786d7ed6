"""A model that the real bilm-tf wrote: its vectors, its perplexity, and training that continues from there.

``bilm_tf/README.md`` says how the files were made.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

import lapse_elmo
from lapse_elmo.trained import Totals
from tests.training.corpora import Prepared, evaluate_alone, prepare, random_sentences, train_alone

FILES = Path(__file__).with_name("bilm_tf")
HELDOUT = random_sentences(22, 40, 43, (1, 9))
FORWARD, BACKWARD = 20.243543769061752, 20.426124185381386  # perplexities that bilm-tf computed
SIZES = ("--projection-size", "8", "--cell-size", "16")


@pytest.fixture(scope="module")
def with_softmax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model in a directory that also has the softmax, where bin/export puts it."""
    folder = shutil.copytree(FILES, tmp_path_factory.mktemp("bilm") / "model")
    with h5py.File(folder / "weights.hdf5", "r+") as file, h5py.File(FILES / "softmax.hdf5", "r") as softmax:
        for name in ("W", "b"):
            file[f"softmax/{name}"] = softmax[name][()]
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("corpus"), random_sentences(21, 1500, 40, (2, 9)), HELDOUT, num_shards=1)


def test_its_vectors() -> None:
    found = lapse_elmo.load(FILES).embed(HELDOUT[:6])
    with np.load(FILES / "vectors.npz") as wanted:
        for number, vectors in enumerate(found):
            np.testing.assert_allclose(vectors, wanted[str(number)], atol=2e-6)
            assert vectors.shape == (3, len(HELDOUT[number].split()), 16)


def test_its_perplexity(with_softmax: Path) -> None:
    totals = Totals()
    for score in lapse_elmo.load(with_softmax).score(HELDOUT):
        totals.add(score)
    assert totals.num_targets == 220 and totals.num_unknown > 0
    assert totals.forward_perplexity == pytest.approx(FORWARD, rel=1e-6)
    assert totals.backward_perplexity == pytest.approx(BACKWARD, rel=1e-6)


def test_training_continues_at_its_perplexity(with_softmax: Path, corpus: Prepared, tmp_path: Path) -> None:
    """The order of the words is another one here: the run has a vocabulary of its own."""
    assert corpus.vocab.read_text().split()[3:] != (FILES / "vocab.txt").read_text().split()[3:]
    source = ("--init-from", str(with_softmax), *SIZES)
    still = train_alone(corpus, tmp_path / "still", *source, "--learning-rate", "1e-30", "--max-steps", "1")
    found = evaluate_alone(still, tmp_path / "still.json")
    assert found["forward_perplexity"] == pytest.approx(FORWARD, rel=1e-5)
    assert found["backward_perplexity"] == pytest.approx(BACKWARD, rel=1e-5)
    # The first steps, with fresh accumulators, may raise it by a third, depending on which batches come last.
    further = train_alone(corpus, tmp_path / "further", *source, "--max-steps", "60")
    mean = evaluate_alone(further, tmp_path / "further.json")["mean_perplexity"]
    assert mean < 1.05 * np.sqrt(FORWARD * BACKWARD)
