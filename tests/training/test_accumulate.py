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
    "--sync", "--epochs", "1", "--batch-size", "6", "--growth-tokens", "300", "--report-every",
    "1", "--num-samples", "20",
)


def run(num_ranks: int, corpus: Prepared, run_dir: Path, *options: str) -> Path:
    with train_job(num_ranks, corpus, run_dir, *OPTIONS, *options) as job:
        ended = job.wait(120)
    assert ended.returncode == 0, ended.output
    return run_dir


@pytest.mark.parametrize(("few", "parts", "first_batch"), [(1, 4, "8"), (2, 2, "2")])
def test_few_ranks_compute_what_many_do(
    small: Prepared, tmp_path_factory: pytest.TempPathFactory, few: int, parts: int, first_batch: str
) -> None:
    """K parts on few ranks give the result of many ranks, also while ranks take turns at small batches."""
    folder = tmp_path_factory.mktemp("accumulate")
    many = run(4, small, folder / "many", "--first-batch", first_batch)
    less = run(few, small, folder / "few", "--accumulate", str(parts), "--first-batch", first_batch)
    theirs, ours = records(many, "train"), records(less, "train")
    assert len(theirs) == len(ours) > 5
    assert ours[0]["train/global_batch_sentences"] == int(first_batch)
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


@pytest.mark.parametrize(("ranks", "parts"), [(4, 1), (1, 4), (2, 2)])
def test_ranks_of_a_node_compute_what_one_does_with_the_whole_batch(tmp_path: Path, ranks: int, parts: int) -> None:
    """The same sentences in a step give the same loss, gradient norm and parameters, also with clipped gradients."""
    text = random_sentences(7, 64, 300, (4, 12))
    corpus = prepare(tmp_path / "text", text, text[:10])
    options = ("--first-batch", "0", "--dropout", "0", "--num-samples", "1000", "--epochs", "6", "--clip-norm", "10")
    one = run(1, corpus, tmp_path / "one", *options, "--batch-size", "64")
    more = run(ranks, corpus, tmp_path / "more", *options, "--batch-size", "16", "--accumulate", str(parts))
    ours, theirs = records(more, "train"), records(one, "train")
    assert len(ours) == len(theirs) == 6
    assert max(line["train/gradient_norm"] for line in theirs) > 10
    for name in ("train/loss_nats", "train/gradient_norm"):
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in theirs], rtol=1e-4)
    arrays = [saved_arrays(checkpoints(run_dir)[-1]) for run_dir in (more, one)]
    for name, values in arrays[0].items():
        np.testing.assert_allclose(values, arrays[1][name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_parts_that_take_turns_compute_what_one_does_with_the_batch(tmp_path: Path) -> None:
    """Of eight parts, four have a sentence in each step. All sentences are the same, so that any four will do."""
    corpus = prepare(tmp_path / "text", ["w00 w01 w02 w03 w01"] * 16, ["w00 w02"])
    options = (
        "--epochs", "1", "--report-every", "1", "--batch-size", "4", "--first-batch", "4", "--dropout", "0",
        "--growth-tokens", "0", "--num-samples", "1000", "--dense-optimizer", "adagrad",
    )
    one = train_alone(corpus, tmp_path / "one", *options)
    more = train_alone(corpus, tmp_path / "more", *options, "--accumulate", "8")
    ours, theirs = records(more, "train"), records(one, "train")
    assert [line["train/global_batch_sentences"] for line in ours] == [4] * 4
    for name in ("train/loss_nats", "train/gradient_norm", "train/global_batch_tokens"):
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in theirs], rtol=1e-4)
    for line in ours:  # equal gradients have no noise
        assert (line["train/noise_scale_tokens"] or 0.0) < 0.01 * line["train/global_batch_tokens"]
    arrays = [saved_arrays(checkpoints(run_dir)[-1]) for run_dir in (more, one)]
    for name, values in arrays[0].items():
        np.testing.assert_allclose(values, arrays[1][name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_more_parts_than_sentences_are_refused(small: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="203 training sentences cannot be shared by 1 ranks with 300 parts each"):
        train_alone(small, tmp_path / "run", "--accumulate", "300")


def test_parts_with_dense_parameters_in_the_server_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--accumulate .* needs --dense allreduce"):
        parse_train(["--accumulate", "2", "--dense", "ps"])


def test_one_rank_cannot_tell_the_noise(small: Prepared, tmp_path: Path) -> None:
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "3", "--report-every", "1")
    assert {line["train/noise_scale_tokens"] for line in records(run_dir, "train")} == {None}
