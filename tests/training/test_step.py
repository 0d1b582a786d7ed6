"""What a step does with the options that act on it: clipping, learning rates by tokens, and dropout masks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lapse_elmo import step
from tests.training.corpora import Prepared, checkpoints, records, saved_arrays, train_alone


@pytest.mark.parametrize("parts", [1, 3])
def test_all_of_a_step_is_clipped_by_the_norm_of_the_mean_gradient(
    small: Prepared, tmp_path: Path, parts: int
) -> None:
    """With plain descent, rows and dense parameters move by the rate times the clipped gradient, for any parts."""
    plain = ("--optimizer", "sgd", "--dense-optimizer", "sgd", "--dense-average", "0", "--accumulate", str(parts))
    options = (*plain, "--max-steps", "1", "--report-every", "1", "--dense-rate", "0.25", "--learning-rate", "0.25")

    def run(name: str, *more: str) -> tuple[dict[str, np.ndarray], float]:
        run_dir = train_alone(small, tmp_path / name, *options, *more)
        return saved_arrays(checkpoints(run_dir)[0]), records(run_dir, "train")[0]["train/gradient_norm"]

    start, _ = run("start", "--learning-rate", "1e-30", "--dense-rate", "1e-30")
    free, norm = run("free", "--clip-norm", "0")
    clipped, same = run("clipped", "--clip-norm", str(norm / 8))
    loose, _ = run("loose", "--clip-norm", str(norm * 1.01))
    assert norm == same > 0
    names = [name for name in start if name.startswith("parameters/") or name in ("embedding", "softmax")]
    square = 0.0
    for name in names:
        moved = free[name] - start[name]
        assert np.abs(moved).max() > 0, name
        square += float(np.square(moved.astype(np.float64)).sum())
        np.testing.assert_allclose(clipped[name] - start[name], moved / 8, rtol=1e-3, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(loose[name], free[name], err_msg=name)
    assert len(names) > 6 and math.sqrt(square) == pytest.approx(0.25 * norm, rel=1e-3)


def test_learning_rates_follow_the_tokens_of_the_run(small: Prepared, tmp_path: Path) -> None:
    """Also where ranks cannot train the batch that was asked for, so that Adam's rate is lower."""
    options = ("--epochs", "2", "--batch-size", "8", "--first-batch", "16", "--growth-tokens", "0", "--dropout", "0")
    law = ("--schedule", "linear", "--warmup-tokens", "400", "--learning-rate", "0.1", "--dense-rate", "0.02")
    told = records(train_alone(small, tmp_path / "run", *options, *law, "--report-every", "1"), "train")
    length = sum(len(sentence.split()) for sentence in small.train) / 203
    steps = [8] * 25 + [3]
    sizes = np.array([*steps, *steps]) * length
    before = np.cumsum(sizes) - sizes
    share = np.where(before < 400, np.minimum((before + sizes) / 400, 1), 1 - (before - 400) / (406 * length - 400))
    np.testing.assert_allclose([line["train/learning_rate"] for line in told], 0.1 * share, rtol=1e-6)
    np.testing.assert_allclose(
        [line["train/dense_learning_rate"] for line in told], 0.02 * math.sqrt(8 / 16) * share, rtol=1e-6
    )


def test_each_part_and_each_step_has_its_own_dropout_masks(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    stream = step.torch_stream

    def noted(*key: object, **more: object) -> torch.Generator:
        generator = stream(*key, **more)  # type: ignore[arg-type]
        drawn.append(generator.initial_seed())
        return generator

    monkeypatch.setattr(step, "torch_stream", noted)
    train_alone(small, tmp_path / "run", "--max-steps", "3", "--accumulate", "2", "--batch-size", "8")
    assert len(drawn) == len(set(drawn)) == 6
    first = drawn[0]
    train_alone(small, tmp_path / "other", "--max-steps", "1", "--batch-size", "8", "--seed", "7")
    assert drawn[-1] != first
