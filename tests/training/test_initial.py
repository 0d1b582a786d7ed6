"""New runs that start from another model or from given word vectors, and the checkpoints that a run keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import lapse_elmo
from lapse_elmo import checkpoint, export, initial, train
from lapse_elmo.checkpoint import saver
from lapse_elmo.config.training import parse_train
from lapse_elmo.corpus.word_vectors import read_word_vectors
from lapse_elmo.errors import CheckpointError, ConfigError, CorpusError, UserError
from lapse_elmo.mpi.world import solo
from lapse_elmo.parameters import Parameters
from tests.training.conftest import Drive
from tests.training.corpora import (
    TINY,
    Prepared,
    checkpoints,
    evaluate_alone,
    prepare,
    random_sentences,
    records,
    saved_arrays,
    train_alone,
)

NOTHING = ("--learning-rate", "1e-30", "--max-steps", "1")  # one step that changes nothing


@pytest.fixture(scope="module")
def model(small: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_alone(small, tmp_path_factory.mktemp("initial") / "model", "--epochs", "6")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Another corpus: 15 of its 30 words are among the 40 of ``small``, in another order of frequency."""
    def renamed(seed: int, count: int) -> list[str]:
        lines = random_sentences(seed, count, 30, (1, 9))
        return [" ".join(w if int(w[1:]) % 2 else f"new{w[1:]}" for w in line.split()) for line in lines]

    return prepare(tmp_path_factory.mktemp("other"), renamed(3, 150), renamed(4, 30))


def test_the_same_corpus_goes_on_at_its_perplexity(small: Prepared, model: Path, tmp_path: Path) -> None:
    wanted = evaluate_alone(model, tmp_path / "model.json")["mean_perplexity"]
    export.main([str(model), "--output", str(tmp_path / "elmo")], solo)
    export.main([str(model), "--output", str(tmp_path / "hub"), "--format", "huggingface"], solo)
    for kind, source in (("run", model), ("elmo", tmp_path / "elmo"), ("hub", tmp_path / "hub")):
        run = train_alone(small, tmp_path / f"from {kind}", "--init-from", str(source), *NOTHING)
        found = evaluate_alone(run, tmp_path / f"{kind}.json")["mean_perplexity"]
        assert found == pytest.approx(wanted, rel=1e-5), kind
    options = ("--epochs", "1", "--report-every", "7", "--dense-optimizer", "adagrad")
    longer = train_alone(small, tmp_path / "longer", "--init-from", str(tmp_path / "elmo"), *options)
    fresh = train_alone(small, tmp_path / "fresh", *options)
    losses = [records(run, "train")[0]["train/loss_nats"] for run in (longer, fresh)]
    assert losses[0] < losses[1] - 0.1, losses


def test_rows_of_shared_words_are_taken_over(other: Prepared, model: Path, drive: Drive, tmp_path: Path) -> None:
    argv = [*other.options, *TINY, *NOTHING, "--init-from", str(model)]
    outcome = drive(2, [("train", [*argv, "--run-dir", str(tmp_path / "run")])])
    assert all(rank["error"] is None for rank in outcome[0]), outcome
    train_alone(other, tmp_path / "drawn", *NOTHING)
    old, new, drawn = (lapse_elmo.load(path) for path in (model, tmp_path / "run", tmp_path / "drawn"))
    words = list(new.vocabulary.words)
    shared = [word for word in words if word in old.vocabulary]
    assert 5 < len(shared) < len(words) - 5
    for name in ("embedding", "softmax"):
        tables = [getattr(trained.stored, name) for trained in (old, new, drawn)]

        def rows(trained: Any, table: Any, some: list[str]) -> np.ndarray:
            return table.weights(np.array(trained.vocabulary.encode(some)) - 1)

        np.testing.assert_array_equal(rows(new, tables[1], shared), rows(old, tables[0], shared))
        unshared = [word for word in words if word not in old.vocabulary]
        np.testing.assert_array_equal(rows(new, tables[1], unshared), rows(drawn, tables[2], unshared))
        np.testing.assert_array_equal(tables[1].weights(np.arange(3)), tables[0].weights(np.arange(3)))
    for name, array in old.stored.dense.items():
        np.testing.assert_array_equal(new.stored.dense[name], array)


def test_counts_of_words_are_printed(
    other: Prepared, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_alone(other, tmp_path / "run", "--init-from", str(model), *NOTHING)
    said = "15 of 30 words start with its rows, 15 are new, 25 of its words are left out; accumulators fresh"
    assert f"--init-from {checkpoints(model)[-1]} (checkpoint): {said}\n" in capfd.readouterr().err


def test_accumulators(small: Prepared, model: Path, tmp_path: Path) -> None:
    """Kept accumulators equal the model's and fresh ones the initial value, since the step hardly changes them."""
    old = saved_arrays(checkpoints(model)[-1])
    parameter = "lstm.forward_layer_0.state_projection.weight"
    for choice in ("kept", "fresh"):
        run = train_alone(
            small, tmp_path / choice, "--init-from", str(model), "--init-accumulators", choice, "--loss-scale", "1e-9",
            "--row-scale", "1e-9",
            *NOTHING,
        )
        new = saved_arrays(checkpoints(run)[-1])
        for key, start in (("embedding", 16), ("softmax", 17)):
            wanted = old[key][:, start:] if choice == "kept" else np.ones_like(old[key][:, start:])
            np.testing.assert_allclose(new[key][:, start:], wanted, rtol=1e-5)
        for name, beta in (("first_moments", 0.9), ("second_moments", 0.999)):
            wanted = beta * old[f"{name}/{parameter}"] * (choice == "kept")
            np.testing.assert_allclose(new[f"{name}/{parameter}"], wanted, rtol=1e-5, atol=1e-9)
            assert abs(wanted).max() > 1e-6 or choice == "fresh"
        assert new["num_steps"] == (old["num_steps"] if choice == "kept" else 0) + 1


@pytest.mark.parametrize(("rule", "counted"), [("adam", 3), ("adagrad", 0)])
def test_averages_are_of_the_new_run(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, counted: int
) -> None:
    """Also if it keeps the state of a model: with all of its steps in the window, they would be that model for long."""
    monkeypatch.setattr(initial, "_UNBIASED_STEPS", 3)
    options = ("--dense-optimizer", rule, "--dense-average", "1", "--max-steps")
    old = train_alone(small, tmp_path / "old", *options, "9")
    run = train_alone(small, tmp_path / "run", *options, "4", "--init-from", str(old), "--init-accumulators", "kept")
    arrays = saved_arrays(checkpoints(run)[-1])
    assert arrays["num_steps"] == counted + 4
    trained = {name: array for name, array in arrays.items() if name.startswith("trained_parameters/")}
    assert trained
    for name, array in trained.items():
        np.testing.assert_array_equal(arrays[name.removeprefix("trained_")], array)


def test_a_rank_reads_only_the_state_that_it_sets(
    small: Prepared, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of a node share the state, which the first of them reads; each counts the steps for itself."""
    config = parse_train([*small.options, *TINY])
    parameters = Parameters(config, 43, solo(), torch.device("cpu"))
    monkeypatch.setattr(Parameters, "writes_dense", False)
    read, get = [], h5py.Dataset.__getitem__

    def note(dataset: h5py.Dataset, *rest: Any) -> Any:
        read.append(dataset.name)
        return get(dataset, *rest)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", note)
    initial._keep_dense_state(checkpoints(model)[-1] / "dense.h5", parameters)
    parameters.server.close()
    assert read == ["/num_steps"]


def test_state_of_another_optimizer_is_refused(small: Prepared, model: Path, tmp_path: Path) -> None:
    options = ("--init-from", str(model), "--init-accumulators", "kept", "--dense-optimizer", "adagrad", *NOTHING)
    with pytest.raises(ConfigError, match="has no state of --dense-optimizer adagrad: give the one"):
        train_alone(small, tmp_path / "run", *options)


@pytest.mark.parametrize("suffix", ["txt", "bin"])
def test_given_word_vectors(other: Prepared, model: Path, drive: Drive, tmp_path: Path, suffix: str) -> None:
    """Rank 0 alone reads the file, and sets the rows on both nodes."""
    vectors = tmp_path / f"vectors.{suffix}"
    export.main([str(model), "--output", str(vectors), "--format", "word2vec"], solo)
    argv = [*other.options, *TINY, *NOTHING, "--init-embedding", str(vectors), "--run-dir", str(tmp_path / "run")]
    outcome = drive(2, [("train", [*argv, "--nodes", "2"])])
    assert all(rank["error"] is None for rank in outcome[0]), outcome
    old, new = lapse_elmo.load(model), lapse_elmo.load(tmp_path / "run")
    shared = [word for word in new.vocabulary.words if word in old.vocabulary]
    tables = [
        trained.stored.embedding.weights(np.array(trained.vocabulary.encode(shared)) - 1) for trained in (old, new)
    ]
    np.testing.assert_array_equal(tables[0], tables[1])


PHRASES = [["new york", "next"], ["NEW YORK", "b"], ["vitamin a", "b"], ["new yor", "b"], ["s\u00e3o paulo", "b"],
           ["b", "two  blanks"], ["b", "a b c d"], ["b", "new york city", "c"]]


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["gensim", "word2vec"])
def test_words_with_blanks(tmp_path: Path, end: bytes) -> None:
    """In text they are read; in binary files, where the reader would lose its place, they are refused."""
    rng = np.random.default_rng(1)
    tables = [rng.standard_normal((3, 16)) * scale for scale in (0.01, 1, 10) for _ in range(5)]
    tables += [np.zeros((3, 16)), np.ones((3, 16)), np.rint(tables[-1])]
    for words in PHRASES:
        for table in tables:
            rows = table[: len(words)].astype("<f4")
            head = f"{len(words)} 16\n".encode()
            lines = [word.encode() + b" " + row.tobytes() + end for word, row in zip(words, rows, strict=True)]
            (tmp_path / "vectors.bin").write_bytes(head + b"".join(lines))
            with pytest.raises(CorpusError, match="give the vectors as word2vec text") as caught:
                list(read_word_vectors(tmp_path / "vectors.bin", 16))
            assert len(str(caught.value).splitlines()) == 1
        with open(tmp_path / "vectors.txt", "wb") as file:
            file.write(head)
            np.savetxt(file, np.column_stack([np.array(words, object), rows]), "%s" + " %.9g" * 16, encoding="utf-8")
        found = list(read_word_vectors(tmp_path / "vectors.txt", 16))
        assert [word for word, _ in found] == words
        np.testing.assert_array_equal([vector for _, vector in found], rows)


def test_vectors_that_look_like_words_are_read(tmp_path: Path) -> None:
    """Among 20,000 vectors many begin with bytes that could be letters and a blank; some have tiny numbers."""
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((20_000, 8)).astype("<f4")
    rows[::7, 3:] *= np.float32(1e-20)
    assert sum(b" " in row.tobytes()[:4] for row in rows) > 100
    lines = [f"w{number} ".encode() + row.tobytes() for number, row in enumerate(rows)]
    (tmp_path / "vectors.bin").write_bytes(b"20000 8\n" + b"".join(lines))
    found = list(read_word_vectors(tmp_path / "vectors.bin", 8))
    np.testing.assert_array_equal([vector for _, vector in found], rows)
    (tmp_path / "vectors.bin").write_bytes(b"19999 8\n" + b"".join(lines))
    with pytest.raises(CorpusError, match="more bytes than the 19,999 words"):
        list(read_word_vectors(tmp_path / "vectors.bin", 8))


def test_refusals(small: Prepared, model: Path, tmp_path: Path) -> None:
    export.main([str(model), "--output", str(tmp_path / "elmo")], solo)
    bad = {
        "size.txt": b"1 3\nw00 1 2 3\n", "head.txt": b"w00 1 2\n", "short.bin": b"2 16\nw00 " + b"\0" * 20,
        "nan.txt": b"1 16\nw00" + b" nan" * 16 + b"\n", "count.txt": b"9 16\nw00" + b" 1" * 16 + b"\n",
        "latin.txt": b"1 16\nw\xe9" + b" 1" * 16 + b"\n", "letters.txt": b"1 16\nw00" + b" x" * 16 + b"\n",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    cases: list[tuple[list[str], type[UserError], str]] = [
        *((["--init-embedding", str(tmp_path / name)], CorpusError, name) for name in (*bad, "gone")),
        (["--init-from", str(tmp_path / "gone")], CheckpointError, "there is no model"),
        (["--init-accumulators", "kept"], ConfigError, "give --init-from"),
        (["--init-from", str(model), "--cell-size", "33"], CheckpointError, "--cell-size 32"),
        (["--init-from", str(model), "--context", "mix"], CheckpointError, "--context top"),
        (["--init-from", str(tmp_path / "elmo"), "--init-accumulators", "kept"], ConfigError, "only runs"),
        (
            ["--init-from", str(model), "--init-accumulators", "kept", "--optimizer", "sgd"], CheckpointError,
            "optimizer",
        ),
    ]
    for argv, error, says in cases:
        with pytest.raises(error) as caught:
            train.main([*small.options, *TINY, "--run-dir", str(tmp_path / "run"), *argv], solo)
        assert len(str(caught.value).splitlines()) == 1 and says in str(caught.value), str(caught.value)
        assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="drop one"):
        parse_train(["--init-from", "a", "--init-embedding", "b"])


def test_checkpoints_that_stay(small: Prepared, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--save-every-steps", "1", "--keep-checkpoints", "3", "--save-at-tokens", "200", "700")
    train_alone(small, run, *options, "--max-steps", "5")
    train_alone(small, run, *options, "--max-steps", "9")
    names = [path.name for path in checkpoints(run)]
    assert names[-3:] == ["step-00000007", "step-00000008", "step-00000009"]
    manifest = json.loads((checkpoints(run)[-1] / "manifest.json").read_text())
    reached = manifest["milestones"]["reached"]
    assert [tokens for tokens, _ in reached] == [200, 700] and manifest["milestones"]["num_tokens"] > 700
    for _, step in reached:
        assert step < 7 and f"step-{step:08d}" in names
    assert len(names) <= 3 + 2 + 1
    lapse_elmo.load(checkpoints(run)[0])


def test_checkpoints_name_the_versions_that_started(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout that changes during a run is not what the run computes with."""
    commits = iter(["first", "second", "third"])
    monkeypatch.setattr(saver, "versions", lambda: {"git_commit": next(commits)})
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "2", "--save-every-steps", "1")
    found = [checkpoint.read_manifest(path)["versions"] for path in checkpoints(run_dir)]
    assert found == [{"git_commit": "first"}] * 2
