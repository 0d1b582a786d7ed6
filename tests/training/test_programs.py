"""``bin/embed``'s other layouts, ``bin/score`` and ``bin/nearest``."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

import lapse_elmo
from lapse_elmo import embed, nearest, score
from lapse_elmo.errors import ConfigError, CorpusError, OutputError, UserError
from lapse_elmo.mpi.world import solo
from tests import mpi
from tests.training.conftest import Drive
from tests.training.corpora import Prepared, evaluate_alone, random_sentences, train_alone

LINES = [*random_sentences(9, 300, 50, (1, 9)), "", "w00", "w03 unheard of w00 <S> </S> <UNK>", "w01"]
ALONE = ("--threads", "1", "--device", "cpu", "--batch-size", "4")


@pytest.fixture(scope="module")
def run(small: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_alone(small, tmp_path_factory.mktemp("programs") / "run", "--max-steps", "3")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


def test_means_of_sentences(run: Path, text: Path, tmp_path: Path) -> None:
    trained = lapse_elmo.load(run)
    for layers in ("all", "top"):
        output = tmp_path / f"{layers}.hdf5"
        embed.main([str(run), str(text), "--output", str(output), "--pool", "mean", "--layers", layers, *ALONE], solo)
        with h5py.File(output, "r") as file:
            assert list(file) == ["means"]
            np.testing.assert_allclose(file["means"][()], trained.sentence_vectors(LINES, layers), atol=1e-6)


def test_sentence_to_index(run: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "vectors.hdf5"
    embed.main([str(run), str(text), "--output", str(output), "--sentence-to-index", *ALONE], solo)
    with h5py.File(output, "r") as file:  # as contextual-repr-analysis reads it
        index = json.loads(file["sentence_to_index"][0])
        for line in LINES:
            assert len(line.split()) == file[index[" ".join(line.split())]].shape[1]


def test_target_words(run: Path, text: Path, drive: Drive, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("w03\nunheard\nw01\nnowhere\n\n")
    argv = [str(run), str(text), "--words", str(tmp_path / "words"), *ALONE]
    alone, three = tmp_path / "alone.npz", tmp_path / "three.npz"
    embed.main([*argv, "--output", str(alone), "--layers", "top"], solo)
    outcome = drive(3, [("embed", [*argv, "--output", str(three)])])
    assert all(rank["error"] is None for rank in outcome[0]), outcome
    trained = lapse_elmo.load(run)
    every = trained.embed(LINES)
    with np.load(alone) as top, np.load(three) as all_layers:
        assert sorted(top) == sorted(all_layers) == ["nowhere", "unheard", "w01", "w03"]
        for word in top:
            wanted = [
                vectors[:, place] for line, vectors in zip(LINES, every, strict=True)
                for place, found in enumerate(line.split()) if found == word
            ]
            assert len(top[word]) == len(all_layers[word]) == len(wanted)
            if wanted:
                np.testing.assert_allclose(all_layers[word], np.stack(wanted), atol=1e-6)
                np.testing.assert_allclose(top[word], np.stack(wanted)[:, -1], atol=1e-6)
        assert top["nowhere"].shape == (0, 32) and all_layers["nowhere"].shape == (0, 3, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.npz", "three.npz", "words"]


def test_score(small: Prepared, run: Path, drive: Drive, tmp_path: Path) -> None:
    heldout = tmp_path / "heldout"
    heldout.write_text("\n".join([*small.heldout, "w01 unheard of w00"]) + "\n")
    table, totals = tmp_path / "words.tsv", tmp_path / "totals.json"
    argv = [str(run), str(heldout), "--threads", "1", "--batch-size", "2"]
    score.main([*argv, "--output", str(table), "--totals", str(totals), "--device", "cpu"], solo)
    outcome = drive(3, [("score", [*argv, "--output", str(tmp_path / "three.tsv")])])
    assert all(rank["error"] is None for rank in outcome[0]), outcome
    rows = read_table(table)
    assert [(int(r["sentence"]), int(r["position"]), r["word"]) for r in rows] == [
        (n, p, word) for n, line in enumerate(heldout.read_text().splitlines()) for p, word in enumerate(line.split())
    ]
    assert [r["word"] for r in rows if r["unknown"] == "1"] == ["unheard", "of"]
    for mine, theirs in zip(rows, read_table(tmp_path / "three.tsv"), strict=True):
        assert float(mine["forward_bits"]) == pytest.approx(float(theirs["forward_bits"]), abs=2e-4)
    found = json.loads(totals.read_text())
    assert found["unknown_share"] == pytest.approx(2 / len(rows)) and found["words"] == len(rows)
    assert found["characters"] == len(heldout.read_text())
    bits = np.log2([found["forward_perplexity"], found["backward_perplexity"]]).mean() * found["targets_a_direction"]
    spelled = (len("unheard") + 1 + len("of") + 1) * np.log2(len(set("".join(heldout.read_text().split()))) + 1)
    assert found["spelling_bits_per_character"] == pytest.approx(spelled / found["characters"])
    assert found["bits_per_character"] == pytest.approx((bits + spelled) / found["characters"])
    heldout.write_text("\n".join(small.heldout) + "\n")
    score.main([str(run), str(heldout), "--totals", str(totals), "--overwrite", *ALONE], solo)
    wanted = evaluate_alone(run, tmp_path / "result.json")
    assert json.loads(totals.read_text())["perplexity"] == pytest.approx(wanted["mean_perplexity"], rel=1e-5)


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_nearest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nearest.main([str(run), "w01", "w02", "--count", "3"], solo)
    lines = capsys.readouterr().out.splitlines()
    for line, word in zip(lines, ("w01", "w02"), strict=True):
        neighbours = lapse_elmo.load(run).nearest(word, 3)
        assert line == f"{word}: " + ", ".join(f"{other} {cosine:.2f}" for other, cosine in neighbours)


def test_bad_input_is_refused_in_one_line(run: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "two").write_text("w00\nw01 w02\n")
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "latin").write_bytes(b"w\xe9\n")
    (tmp_path / "text").write_bytes(b"w00\nw0\xe9\n")
    before = sorted(tmp_path.iterdir())
    npz, hdf5 = str(tmp_path / "a.npz"), str(tmp_path / "a.hdf5")
    cases: list[tuple[list[str], type[UserError], str]] = [
        (["--output", npz, "--words", str(tmp_path / "two")], CorpusError, "line 2"),
        (["--output", npz, "--words", str(tmp_path / "empty")], CorpusError, "no words"),
        (["--output", npz, "--words", str(tmp_path / "latin")], CorpusError, "UTF-8"),
        (["--output", npz, "--words", str(tmp_path / "gone")], CorpusError, "gone"),
        (["--output", hdf5, "--words", str(tmp_path / "two")], ConfigError, ".npz"),
        (["--output", npz], ConfigError, "only --words writes an archive"),
        (["--output", npz, "--words", "x", "--pool", "mean"], ConfigError, "--pool"),
    ]
    for argv, error, says in cases:
        refused(embed, [str(run), str(text), *argv], error, says)
    bad = str(tmp_path / "text")
    refused(embed, [str(run), bad, "--output", hdf5], CorpusError, "line 2")
    refused(score, [str(run), bad, "--output", hdf5], CorpusError, "line 2")
    refused(score, [str(run), str(text), "--output", bad], OutputError, "already exists")
    refused(nearest, [str(run), "unheard"], CorpusError, "not in the vocabulary")
    assert sorted(tmp_path.iterdir()) == before


def refused(program: object, argv: list[str], error: type[UserError], says: str) -> None:
    with pytest.raises(error) as caught:
        program.main(argv, solo)  # type: ignore[attr-defined]
    assert len(str(caught.value).splitlines()) == 1 and says in str(caught.value)


def test_memory_does_not_grow_with_the_text(run: Path, tmp_path: Path) -> None:
    """Six times as much text takes as much memory, but for a few MB; its vectors are 31 MB more.

    Lines are long, since HDF5 keeps up to 30 MB about the datasets of a file, which are one per line. Rank 0, which
    writes, has one result of the other rank at a time, and never those of a round.
    """
    texts = [tmp_path / "short", tmp_path / "long"]
    for text, lines in zip(texts, (160, 960), strict=True):
        text.write_text(("w00 " * 100 + "\n") * lines)
    (tmp_path / "words").write_text("w00\n")
    script = Path(__file__).with_name("streaming_program.py")
    job = mpi.mpirun(2, [script, "result.json", run, *texts], timeout=300, cwd=tmp_path, fork=False)
    assert job.returncode == 0, job.output
    ranks = json.loads((tmp_path / "result.json").read_text())
    assert [rank["most_held"] for rank in ranks] == [1, 0]
    for before, after in (rank["peaks"] for rank in ranks):
        assert after < before + 20e6, ranks
    with np.load(tmp_path / "1.npz") as found:
        assert found["w00"].shape == (960 * 100, 3, 32)
