"""One private Slurm for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.training.corpora import Prepared, prepare, random_sentences


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running
    assert running.left == (), "processes outlived their Slurm"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Return a corpus of 203 training sentences of 40 words, and 41 held-out ones."""
    train, heldout = random_sentences(1, 203, 40, (1, 12)), random_sentences(2, 41, 40, (1, 12))
    return prepare(tmp_path_factory.mktemp("corpus"), train, heldout)
