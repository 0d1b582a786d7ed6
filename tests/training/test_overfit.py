"""Learning twenty sentences by heart, and reading the saved model back on other numbers of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests import mpi
from tests.training.conftest import Drive
from tests.training.corpora import TINY, Prepared, evaluate_alone, prepare, random_sentences, records

# With --dense ps the ranks push dense parameters in an order that depends on their timing: 1.57 on a busy machine.
LIMITS = {"allreduce-adagrad": 1.5, "ps-adagrad": 1.8, "allreduce-sgd": 1.8, "ps-sgd": 1.8}
VARIANTS = {
    "allreduce-adagrad-top-fused": "--dense allreduce --optimizer adagrad --context top --lstm fused",
    "ps-adagrad-mix-allennlp": "--dense ps --optimizer adagrad --context mix --lstm allennlp",
    "allreduce-sgd-mix-fused": "--dense allreduce --optimizer sgd --context mix --lstm fused",
    "ps-sgd-top-fused": "--dense ps --optimizer sgd --context top --lstm fused --learning-rate 0.1",
}
SIZES = ["--projection-size", "32", "--cell-size", "64", "--num-layers", "1", "--dropout", "0"]
LENGTH = ["--batch-size", "5", "--epochs", "8"]
REPORTED = ("forward_perplexity", "backward_perplexity", "mean_perplexity")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Return twenty sentences, repeated so that an epoch has more than two steps; held-out text is the same."""
    sentences = random_sentences(5, 20, 60, (11, 14))
    return prepare(tmp_path_factory.mktemp("twenty"), 13 * sentences, sentences, num_shards=2)


@pytest.fixture(scope="module")
def runs(corpus: Prepared, drive: Drive, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train each variant on two ranks; return the run directories."""
    folder = tmp_path_factory.mktemp("overfit")
    cases = []
    for name, options in VARIANTS.items():
        argv = [*corpus.options, *TINY, *SIZES, *LENGTH, *options.split(), "--run-dir", str(folder / name)]
        cases.append(("train", argv))
    for outcome in drive(2, cases):
        assert [rank["error"] for rank in outcome] == [None, None], outcome
    return {name: folder / name for name in VARIANTS}


def reported(run_dir: Path) -> list[float]:
    """Return the held-out perplexities that training reported last."""
    return [records(run_dir, "epoch")[-1][f"heldout/{name}"] for name in REPORTED]


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_sentences_are_learnt_by_heart(corpus: Prepared, runs: dict[str, Path], variant: str) -> None:
    """No model can know which sentence comes: its first word costs log(20) nats, which gives the best perplexity."""
    best = math.exp(20 * math.log(20) / sum(len(sentence.split()) + 1 for sentence in corpus.heldout))
    forward, backward, mean = reported(runs[variant])
    limit = LIMITS["-".join(variant.split("-")[:2])]
    assert best * 0.97 < forward < limit
    assert best * 0.97 < backward < limit
    assert mean == pytest.approx(math.sqrt(forward * backward))


def test_one_rank_reads_what_two_have_trained(runs: dict[str, Path], tmp_path: Path) -> None:
    for name, run_dir in runs.items():
        result = evaluate_alone(run_dir, tmp_path / f"{name}.json")
        assert [result[key] for key in REPORTED] == pytest.approx(reported(run_dir), rel=1e-4), name


def test_three_ranks_read_what_two_have_trained(runs: dict[str, Path], drive: Drive, tmp_path: Path) -> None:
    cases = []
    for name, run_dir in runs.items():
        cases.append(("evaluate", [str(run_dir), "--output", str(tmp_path / f"{name}.json"), "--batch-size", "3"]))
    drive(3, cases)
    for name, run_dir in runs.items():
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert [result[key] for key in REPORTED] == pytest.approx(reported(run_dir), rel=1e-4), name


def test_the_program_evaluates_a_checkpoint_by_its_folder(
    corpus: Prepared, runs: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = runs["ps-adagrad-mix-allennlp"]
    (last,) = (run_dir / "checkpoints").glob("step-00000208")
    arguments = ["bin/evaluate", str(last), "--split", "train", "--output", str(tmp_path / "result.json")]
    job = mpi.mpirun(2, arguments, timeout=90)
    assert job.returncode == 0, job.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["split"] == "train" and result["num_sentences"] == 260  # those held out, thirteen times
    assert result["num_targets"] == sum(len(sentence.split()) + 1 for sentence in corpus.train)
    assert [result[key] for key in REPORTED] == pytest.approx(reported(run_dir), rel=1e-4)
