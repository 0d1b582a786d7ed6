"""Uses of a saved model: its exported files in other programs, and vectors of text."""

from __future__ import annotations

import gzip
import json
import resource
import signal
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from lapse_elmo import embed, export, rounds
from lapse_elmo.errors import CorpusError, OutputError, UserError
from lapse_elmo.model import reference
from lapse_elmo.mpi.world import solo
from lapse_elmo.trained import StoredModel, opening
from tests import mpi
from tests.training.conftest import Drive
from tests.training.corpora import Prepared, evaluate_alone, random_sentences, train_alone

VARIANTS = {
    "top": ("--context", "top"), "mix": ("--context", "mix", "--lstm", "allennlp"),
    "one layer": ("--context", "mix", "--num-layers", "1", "--cell-clip", "0.5"),
    "sgd": ("--optimizer", "sgd", "--learning-rate", "0.01"),
    "no boundaries": ("--no-boundaries",),
}
LINES = [*random_sentences(9, 11, 50, (1, 9)), "", "w00", "w03 unheard of w00 <S> </S> <UNK>", "   ", "w01"]


@pytest.fixture(scope="module")
def runs(small: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return models trained for three steps, which change every parameter."""
    folder = tmp_path_factory.mktemp("used")
    options = ("--max-steps", "3")
    return {name: train_alone(small, folder / name, *options, *variant) for name, variant in VARIANTS.items()}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def exported(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    for name, run_dir in runs.items():
        export.main([str(run_dir), "--output", str(folder / name)], solo)
    return {name: folder / name for name in runs}


def embedded(run_dir: Path, output: Path, *options: str) -> list[np.ndarray]:
    embed.main([str(run_dir), *options, "--output", str(output), "--threads", "1", "--device", "cpu"], solo)
    return vectors_in(output)


def vectors_in(path: Path) -> list[np.ndarray]:
    with h5py.File(path, "r") as file:
        assert set(file) == {str(number) for number in range(len(file))}
        return [file[str(number)][()] for number in range(len(file))]


class Reader:
    """A reader of exported files that knows nothing of this project: AllenNLP's ElmoLstm, and NumPy."""

    def __init__(self, folder: Path) -> None:
        self.options: dict[str, Any] = json.loads((folder / "options.json").read_text())
        self.words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        with h5py.File(folder / "weights.hdf5", "r") as file:
            self.embedding, self.softmax = file["embedding"][()], file["softmax/W"][()]
            self.bias = file["softmax/b"][()]
            self.mix = (file["mix/scalars"][()], file["mix/gamma"][()]) if "mix" in file else None
        lstm = self.options["lstm"]
        self.lstm = reference.elmo_lstm()(
            lstm["projection_dim"], lstm["projection_dim"], lstm["dim"], lstm["n_layers"],
            memory_cell_clip_value=lstm["cell_clip"], state_projection_clip_value=lstm["proj_clip"],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.lstm.load_weights(str(folder / "weights.hdf5"))
        self.lstm.eval()

    def classes(self, words: list[str], boundaries: bool) -> list[int]:
        """Return the words' lines of the vocabulary; a special token inside a sentence is an unknown word."""
        known = {word: line for line, word in enumerate(self.words) if line > 2}
        inside = [known.get(word, 2) for word in words]
        return [0, *inside, 1] if boundaries else inside

    @torch.no_grad()
    def layers(self, classes: list[int]) -> np.ndarray:
        """Return the layers (L + 1, T, 2D), boundaries included."""
        tokens = torch.from_numpy(self.embedding[classes])[None]
        self.lstm.reset_states()
        outputs = self.lstm(tokens, torch.ones(1, len(classes), dtype=torch.bool))[:, 0]
        return torch.cat([torch.cat([tokens, tokens], 2), outputs]).numpy()

    def nll(self, classes: list[int]) -> tuple[float, float, int]:
        """Return the summed nll of both directions and the targets per direction, by the full softmax in float64."""
        layers = self.layers(classes).astype(np.float64)
        top = layers[-1]
        if self.mix is not None:
            shares = np.exp(self.mix[0].astype(np.float64))
            top = self.mix[1] * np.tensordot(shares / shares.sum(), layers, 1)
        forward, backward = np.split(top, 2, 1)
        found = []
        for context, target in ((forward[:-1], classes[1:]), (backward[1:], classes[:-1])):
            logits = context @ self.softmax.T.astype(np.float64) + self.bias
            found.append(float((np.log(np.exp(logits).sum(1)) - logits[np.arange(len(target)), target]).sum()))
        return found[0], found[1], len(classes) - 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_allennlp_computes_our_vectors_from_the_exported_files(
    runs: dict[str, Path], exported: dict[str, Path], text: Path, tmp_path: Path, variant: str
) -> None:
    reader = Reader(exported[variant])
    boundaries = variant != "no boundaries"
    batch_size = "4" if boundaries else "1"  # then a batch has no tokens at all
    vectors = embedded(runs[variant], tmp_path / "vectors.hdf5", str(text), "--batch-size", batch_size)
    assert len(vectors) == len(LINES)
    for line, found in zip(LINES, vectors, strict=True):
        words = line.split()
        assert found.shape == (reader.options["lstm"]["n_layers"] + 1, len(words), 32) and found.dtype == np.float32
        if words:
            wanted = reader.layers(reader.classes(words, boundaries))
            np.testing.assert_allclose(found, wanted[:, 1:-1] if boundaries else wanted, atol=2e-6)
    assert np.abs(vectors[0]).max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_perplexity_can_be_had_from_the_exported_files_alone(
    small: Prepared, runs: dict[str, Path], exported: dict[str, Path], tmp_path: Path, variant: str
) -> None:
    reader = Reader(exported[variant])
    ours = evaluate_alone(runs[variant], tmp_path / "result.json")
    lines = [line.split() for line in small.heldout]
    sums = np.sum([reader.nll(reader.classes(words, variant != "no boundaries")) for words in lines], 0)
    assert int(sums[2]) == ours["num_targets"]
    for name, nll in (("forward", sums[0]), ("backward", sums[1]), ("mean", (sums[0] + sums[1]) / 2)):
        assert ours[f"{name}_perplexity"] == pytest.approx(np.exp(nll / sums[2]), rel=1e-5)


def test_the_options_are_bilm_tfs(small: Prepared, exported: dict[str, Path]) -> None:
    options = json.loads((exported["top"] / "options.json").read_text())
    assert options["lstm"] == {
        "dim": 32, "projection_dim": 16, "n_layers": 2, "cell_clip": 3.0, "proj_clip": 3.0,
        "use_skip_connections": True,
    }
    words = (exported["top"] / "vocab.txt").read_text().splitlines()
    assert options["n_tokens_vocab"] == len(words) == len(set(words)) and words[:3] == ["<S>", "</S>", "<UNK>"]
    assert options["n_train_tokens"] == sum(len(line.split()) for line in small.train)
    assert "char_cnn" not in options and options["bidirectional"] is True
    assert sorted(path.name for path in exported["top"].iterdir()) == [
        "meta.json", "options.json", "vocab.txt", "weights.hdf5"
    ]


def test_layers(runs: dict[str, Path], text: Path, tmp_path: Path) -> None:
    every = embedded(runs["top"], tmp_path / "all.hdf5", str(text))
    top = embedded(runs["top"], tmp_path / "top.hdf5", str(text), "--layers", "top")
    average = embedded(runs["top"], tmp_path / "average.hdf5", str(text), "--layers", "average")
    for of_line, last, mean in zip(every, top, average, strict=True):
        np.testing.assert_array_equal(last, of_line[-1])
        np.testing.assert_allclose(mean, of_line.mean(0), atol=1e-6)


def test_any_number_of_ranks_and_files_gives_the_same(
    runs: dict[str, Path], exported: dict[str, Path], text: Path, drive: Drive, tmp_path: Path
) -> None:
    once = embedded(runs["mix"], tmp_path / "one.hdf5", str(text))
    with gzip.open(tmp_path / "text.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(LINES) + "\n")
    model, texts = str(runs["mix"]), [str(text), str(tmp_path / "text.gz")]
    outcome = drive(3, [
        ("embed", [model, *texts, "--output", str(tmp_path / "three.hdf5"), "--batch-size", "2"]),
        ("export", [model, "--output", str(tmp_path / "exported")]),
    ])
    assert all(rank["error"] is None for case in outcome for rank in case), outcome
    for found, wanted in zip(vectors_in(tmp_path / "three.hdf5"), once + once, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    for name in ("options.json", "weights.hdf5", "vocab.txt"):
        assert (tmp_path / "exported" / name).read_bytes() == (exported["mix"] / name).read_bytes()


def test_the_end_of_training_names_commands_that_work(
    small: Prepared, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_alone(small, tmp_path / "run", "--max-steps", "2")
    ends = {"DIR": str(tmp_path / "out"), "TEXT...": str(text), "FILE.hdf5": str(tmp_path / "out.hdf5")}
    found = {}
    for line in capfd.readouterr().out.splitlines():
        what, _, command = line.partition(":")
        if what.startswith("To "):
            words = command.split("[")[0].split("(")[0].split()
            found[what] = [ends.get(word, word) for word in words]
    assert list(found) == ["To evaluate it", "To export it", "To embed text"]
    jobs = {what: mpi.mpirun(1, command, launcher=False) for what, command in found.items()}
    assert all(job.returncode == 0 for job in jobs.values()), [job.output for job in jobs.values()]
    assert "mean" in jobs["To evaluate it"].stdout
    assert str(tmp_path / "out") in jobs["To export it"].stdout and (tmp_path / "out" / "weights.hdf5").exists()
    assert f"{len(LINES)} lines" in jobs["To embed text"].stdout
    assert len(vectors_in(tmp_path / "out.hdf5")) == len(LINES)


def refused(program: Any, argv: list[str], error: type[UserError], *says: str) -> None:
    with pytest.raises(error) as caught:
        program.main(argv, solo)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 and all(text in lines[0] for text in says), lines


def test_bad_input_is_refused_and_nothing_is_lost(runs: dict[str, Path], text: Path, tmp_path: Path) -> None:
    model = str(runs["top"])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("months of work")
    refused(export, [model, "--output", str(mine)], OutputError, "already exists", "--overwrite")
    refused(export, [model, "--output", str(mine), "--overwrite"], OutputError, "thesis.txt", "would be lost")
    refused(export, [model, "--output", str(mine / "thesis.txt"), "--overwrite"], OutputError, "is a file")
    refused(embed, [model, str(text), "--output", str(mine / "thesis.txt")], OutputError, "already exists")
    refused(embed, [model, str(text), "--output", str(mine), "--overwrite"], OutputError, "directory")
    refused(embed, [model, str(tmp_path / "gone"), "--output", str(tmp_path / "a")], CorpusError, "gone", "not exist")
    (tmp_path / "latin").write_bytes(b"w00\nw0\xe9\n")
    refused(embed, [model, str(tmp_path / "latin"), "--output", str(tmp_path / "a")], CorpusError, "line 2", "UTF-8")
    (tmp_path / "long").write_text("w00\n" + "w01 " * (rounds.LONGEST + 1))
    refused(embed, [model, str(tmp_path / "long"), "--output", str(tmp_path / "a")], CorpusError, "10,001", "number 1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latin", "long", "mine"]
    assert (mine / "thesis.txt").read_text() == "months of work"


def test_overwrite(runs: dict[str, Path], text: Path, tmp_path: Path) -> None:
    for name in ("top", "mix"):
        export.main([str(runs[name]), "--output", str(tmp_path / "out"), "--overwrite"], solo)
        embedded(runs[name], tmp_path / "out.hdf5", str(text), "--overwrite")
    with h5py.File(tmp_path / "out" / "weights.hdf5", "r") as file:
        assert "mix" in file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.hdf5"]


@pytest.mark.parametrize("limit", [20, 3000])
def test_a_full_disk(
    runs: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """A disk that is full at once or at the close of the file leads to one line, and no file is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    open_together = opening.open_together

    def then_full(*arguments: Any) -> StoredModel:
        opened = open_together(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return opened

    monkeypatch.setattr(export, "open_together", then_full)
    monkeypatch.setattr(embed, "open_together", then_full)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for program, argv in ((export, []), (embed, [str(text)])):
            with pytest.raises(OutputError, match="free some space"):
                program.main([str(runs["top"]), *argv, "--output", str(tmp_path / "out")], solo)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert not list(tmp_path.iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
