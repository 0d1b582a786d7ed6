"""A rank with K parts does what K ranks do: the same parameters but for the rounding of sums, and the same figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lapse_elmo.config.training import parse_train
from lapse_elmo.errors import ConfigError
from tests.training.corpora import (
    Prepared,
    checkpoints,
    prepare,
    random_sentences,
    records,
    saved_arrays,
    train_alone,
    train_job,
)

OPTIONS = (
    "--sync", "--epochs", "1", "--batch-size", "6", "--first-batch", "8", "--growth-tokens", "300", "--report-every",
    "1", "--num-samples", "20",
)


def run(num_ranks: int, corpus: Prepared, run_dir: Path, *options: str) -> Path:
    with train_job(num_ranks, corpus, run_dir, *OPTIONS, *options) as job:
        ended = job.wait(120)
    assert ended.returncode == 0, ended.output
    return run_dir


@pytest.mark.parametrize(("few", "parts"), [(1, 4), (2, 2)])
def test_few_ranks_compute_what_many_do(
    small: Prepared, tmp_path_factory: pytest.TempPathFactory, few: int, parts: int
) -> None:
    folder = tmp_path_factory.mktemp("accumulate")
    many = run(4, small, folder / "many")
    less = run(few, small, folder / "few", "--accumulate", str(parts))
    theirs, ours = records(many, "train"), records(less, "train")
    assert len(theirs) == len(ours) > 5
    for name in ("train/global_batch_sentences", "train/global_batch_tokens", "train/learning_rate"):
        assert [line[name] for line in theirs] == [line[name] for line in ours]
    for name in ("train/loss_nats", "train/gradient_norm"):
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in theirs], rtol=1e-4)
    scale, same = (np.array([line["train/noise_scale_tokens"] or np.nan for line in both]) for both in (ours, theirs))
    assert np.isfinite(scale).sum() > 5
    np.testing.assert_allclose(scale, same, rtol=2e-2)
    arrays = [saved_arrays(checkpoints(run_dir)[-1]) for run_dir in (less, many)]
    for name, values in arrays[0].items():
        np.testing.assert_allclose(values, arrays[1][name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_parts_are_clipped_as_one_batch_is(tmp_path: Path) -> None:
    """Gradients are clipped by the norm of their mean over all parts; the gradient of a single part is noisier."""
    text = random_sentences(7, 300, 1000, (4, 12))
    corpus = prepare(tmp_path / "text", text, text[:10])
    options = ("--max-steps", "12")
    whole = run(1, corpus, tmp_path / "whole", "--batch-size", "24", *options)
    parts = run(1, corpus, tmp_path / "parts", "--accumulate", "4", *options)
    norms = [np.median([line["train/gradient_norm"] for line in records(of, "train")]) for of in (whole, parts)]
    assert 0.9 < norms[1] / norms[0] < 1.1, norms


def test_more_parts_than_sentences_are_refused(small: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="203 training sentences cannot be shared by 1 ranks with 300 parts each"):
        train_alone(small, tmp_path / "run", "--accumulate", "300")


def test_parts_with_dense_parameters_in_the_server_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--accumulate .* needs --dense allreduce"):
        parse_train(["--accumulate", "2", "--dense", "ps"])


def test_one_rank_cannot_tell_the_noise(small: Prepared, tmp_path: Path) -> None:
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "3", "--report-every", "1")
    assert {line["train/noise_scale_tokens"] for line in records(run_dir, "train")} == {None}
