"""The plan for other machines: its arithmetic, its text, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from lapse_elmo import train
from lapse_elmo.balance import longest_batch
from lapse_elmo.config.plan import PlanConfig
from lapse_elmo.config.server import ServerConfig
from lapse_elmo.config.training import Config, ModelConfig, TrainingConfig, parse_train
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.errors import ConfigError
from lapse_elmo.forecast import Forecast, PlannedShape, forecast
from lapse_elmo.frequent_rows import num_frequent
from lapse_elmo.memory import dense_size, estimate
from lapse_elmo.mpi.world import solo
from lapse_elmo.training_data import TrainingData, open_training_data
from lapse_elmo.trial import Trial
from tests.mpi import mpirun
from tests.test_batches import FakeShards, stream_of
from tests.training.corpora import TINY, Prepared, prepare, random_sentences

TRIAL = Trial(1, 1, 5, {"pull": 0.1, "compute": 1.0, "agree": 0.2, "push": 0.1, "other": 0.0}, 200.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    train_sentences, heldout = random_sentences(1, 400, 40, (1, 12)), random_sentences(2, 41, 40, (1, 12))
    return prepare(tmp_path_factory.mktemp("corpus"), train_sentences, heldout)


@pytest.fixture(scope="module")
def data(corpus: Prepared) -> TrainingData:
    return open_training_data(parse_train(corpus.options), solo())


def planned(data: TrainingData, nodes: int, ranks: int = 4, **plan: float) -> Forecast:
    config = Config(plan=PlanConfig(nodes, ranks, **plan), training=TrainingConfig(batch_size=10, epochs=3))
    return of(config, data, PlannedShape(nodes, ranks))


def of(config: Config, data: TrainingData, shape: PlannedShape) -> Forecast:
    return forecast(config, data, shape, TRIAL, estimate(config, data.vocabulary.size, data.train, shape))


def test_one_node_takes_what_was_measured(data: TrainingData) -> None:
    one = planned(data, 1, ranks=1)
    assert one.rows.num_bytes == pytest.approx(0, abs=1e-6) and one.dense_bytes == 0
    assert one.step_s == pytest.approx(1.4, rel=1e-6)
    assert one.tokens_per_s == pytest.approx(200 / 1.4, rel=1e-6)
    assert one.run_tokens == 3 * data.train.num_tokens


def test_more_ranks_wait_for_a_longer_batch(data: TrainingData) -> None:
    """What grows with the batch takes as much longer as the longest batch of the step has more words."""
    plan = planned(data, 1, ranks=8)
    config = Config(training=TrainingConfig(batch_size=10))
    longer = longest_batch(config, data.train, 8) - 1
    assert longer > 0 and plan.seconds["longest batch"] == pytest.approx(1.2 * longer)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("num_ranks", [2, 8, 32])
def test_the_longest_batch_of_a_step(num_ranks: int, accumulate: int) -> None:
    """The estimate from some of the ranks is close to the words of all ranks' batches."""
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(3.15, 0.5, num_ranks * accumulate * 8 * 64), 1, 400).astype(int)
    config = Config(training=TrainingConfig(batch_size=8, accumulate=accumulate))
    num_workers = num_ranks * accumulate
    words = np.array([
        stream_of(lengths, worker, num_workers, 8).first_words() for worker in range(num_workers)
    ]).reshape(num_ranks, accumulate, -1).sum(1)
    measured = words.max(0).sum() / words.mean(0).sum()
    shards: ShardSet = FakeShards(lengths)  # type: ignore[assignment]
    assert longest_batch(config, shards, num_ranks) == pytest.approx(measured, abs=0.02)


def test_the_dense_sum_is_that_of_a_ring(data: TrainingData) -> None:
    """2 (M - 1) / M of the gradients leave each node, at 1 Gbit/s; two trees of log2 M hops."""
    model = ModelConfig()
    plan = planned(data, 8, network_gbit=1.0, network_us=1000.0)
    config = Config(training=TrainingConfig(batch_size=10))
    words, classes = num_frequent(config, data.vocabulary.size, plan.shape)
    assert 0 < words <= classes
    rows = words * model.projection_size + classes * (model.projection_size + 1)
    size = 4 * (dense_size(model.projection_size, model.cell_size, model.num_layers) + rows)
    assert plan.dense_bytes == 2 * 7 / 8 * size
    assert plan.seconds["dense sum"] == pytest.approx(plan.dense_bytes * 8e-9 + 6 * 0.001)


@pytest.mark.parametrize(("bf16", "every", "per_number"), [(False, 4, 12 / 4), (True, 16, 10 / 16), (True, 1, 2)])
def test_local_steps_send_averages(data: TrainingData, bf16: bool, every: int, per_number: float) -> None:
    """Weights and moments at each K-th step, and one in 61 gradients at each; first moments may be bfloat16."""
    training = TrainingConfig(batch_size=10, local_steps=every, node_sums="bf16" if bf16 else "fp32")
    config, shape = Config(training=training, server=ServerConfig(frequent_rows=0)), PlannedShape(8, 4)
    numbers = dense_size(config.model.projection_size, config.model.cell_size, config.model.num_layers)
    sampled = 4 / 61 if every > 1 else 0
    assert of(config, data, shape).dense_bytes == pytest.approx(2 * 7 / 8 * numbers * (per_number + sampled))


def test_a_slow_network_is_the_limit(data: TrainingData) -> None:
    fast, slow = planned(data, 4), planned(data, 4, network_gbit=0.01)
    assert fast.step_s > fast.network_s and slow.network_s > fast.step_s
    assert slow.step_s == max(slow.network_s, sum(slow.seconds.values()))
    assert slow.tokens_per_s < fast.tokens_per_s


def test_tables_are_divided_among_the_nodes(data: TrainingData) -> None:
    """Rows and their copies in checkpoints are; gradients and activations are there per rank."""
    config = Config(model=ModelConfig("original"))
    data = dataclasses.replace(data, vocabulary=dataclasses.replace(data.vocabulary, size=800_000))
    one, many = (of(config, data, PlannedShape(nodes, 4)).memory for nodes in (1, 64))
    assert many.rows == one.rows and many.shared < one.shared / 3
    assert (many.dense, many.activations) == (one.dense, one.activations)


def test_only_one_rank_copies_the_dense_parameters(data: TrainingData) -> None:
    """A node's memory is the sum over its ranks; the first one copies the dense parameters for a checkpoint, too."""
    config, shape = Config(model=ModelConfig("original")), PlannedShape(2, 32)
    ranks = [
        estimate(config, data.vocabulary.size, data.train, dataclasses.replace(shape, rank=rank)) for rank in range(32)
    ]
    assert ranks[0].copy > 2 * sum(other.copy for other in ranks[1:]) > 0
    libraries = sum(rank.libraries for rank in ranks)  # the test's own, which may grow between two estimates
    expected = ranks[0].shared + sum(rank.rank for rank in ranks)
    assert of(config, data, shape).node_bytes == pytest.approx(expected, abs=0.1 * libraries)


def test_max_steps_bound_the_run(data: TrainingData) -> None:
    config = Config(training=TrainingConfig(max_steps=2))
    plan = of(config, data, PlannedShape(2, 1))
    assert plan.run_tokens == 2 * 2 * 200


def test_the_plan_is_printed_and_nothing_written(corpus: Prepared, tmp_path: Path) -> None:
    options = [*corpus.options, *TINY, "--batch-size", "4", "--run-dir", str(tmp_path / "run")]
    job = mpirun(2, ["bin/train", *options, "--plan-nodes", "8"])
    assert job.returncode == 0, job.output
    assert "plan for 8 nodes of 2 ranks, 100 Gbit/s and 10 us between nodes" in job.stdout
    assert "from 20 steps of 2 ranks here as 2 nodes:" in job.stdout
    step = re.search(r"seconds per step: ([\d.]+): (.*); the link", job.stdout)
    assert step, job.output
    phases = dict(re.findall(r"([a-z ]+) (-?[\d.]+)(?:, |$)", step[2]))
    measured, computed = {"pull", "compute", "agree", "push", "other"}, {"dense sum", "reports", "serving"}
    assert set(phases) == measured | computed | {"longest batch"}
    assert math.isclose(float(step[1]), sum(map(float, phases.values())), abs_tol=0.005)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--technique", "static"], "cannot count the traffic of --technique static"),
        (["--sync"], "cannot count the traffic of --sync"),
        (["--share-samples", "job"], "--share-samples job"),
        (["--sampling-scheme", "naive"], "--sampling-scheme naive"),
        (["--dense", "ps"], "--dense ps"),
        (["--nodes", "2"], "--nodes 2"),
        (["--network-gbit", "0"], "--network-gbit"),
        (["--plan-ranks", "-1"], "--plan-ranks"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_train(["--plan-nodes", "4", *options])


def test_more_ranks_than_sentences(corpus: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="400 training sentences cannot be shared by 64 x 32 ranks"):
        train.main(
            [*corpus.options, *TINY, "--plan-nodes", "64", "--plan-ranks", "32", "--run-dir", str(tmp_path)], solo
        )


def test_a_saved_config_without_a_plan_is_read(tmp_path: Path) -> None:
    from lapse_elmo.config.cli import as_tables
    from lapse_elmo.config.training import from_tables

    tables = json.loads(json.dumps(as_tables(Config())))
    del tables["plan"]
    assert from_tables(tables) == Config()
