"""``bin/evaluate`` without ``--shards`` takes those of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lapse_elmo.errors import CorpusError
from tests.training.corpora import Prepared, evaluate_alone, prepare, train_alone


def test_training_text_is_that_of_the_run(small: Prepared, tmp_path: Path) -> None:
    """The directory of ``--heldout`` has training text as well, but the run was not trained on that."""
    other = prepare(tmp_path / "other", 2 * small.train, small.heldout[:3])  # the same vocabulary
    run = train_alone(small, tmp_path / "run", "--max-steps", "1", "--heldout", str(other.shards))
    found = {
        split: evaluate_alone(run, tmp_path / f"{split}.json", "--split", split) for split in ("heldout", "train")
    }
    assert (found["heldout"]["shards"], found["heldout"]["num_sentences"]) == (str(other.shards), 3)
    assert (found["train"]["shards"], found["train"]["num_sentences"]) == (str(small.shards), len(small.train))


def test_shards_named_relative_to_another_directory(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small.shards.parent)
    run = train_alone(small, tmp_path / "run", "--max-steps", "1", "--shards", small.shards.name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=rf"the shards {small.shards.name}, which are not in .*--shards DIR"):
        evaluate_alone(run, tmp_path / "result.json")
    assert evaluate_alone(run, tmp_path / "result.json", "--shards", str(small.shards))["mean_perplexity"] > 1
