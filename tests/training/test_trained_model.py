"""``lapse_elmo.load`` and what it gives: vectors, scores, neighbours, substitutes, a module; every kind of model."""

from __future__ import annotations

import doctest
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import lapse_elmo
from lapse_elmo import embed, export
from lapse_elmo.errors import CheckpointError, CorpusError, UserError
from lapse_elmo.mpi.world import solo
from lapse_elmo.trained import Totals, loading, model, module, scores, stored
from tests.mpi import ROOT
from tests.training.conftest import Drive
from tests.training.corpora import TINY, Prepared, evaluate_alone, train_alone

LINES = ["w01 w02 w00", "", "w03 unheard of w00 <S> </S> <UNK>", "w01", "w00 w01 w02 w03 w04 w05 w06 w07"]
VARIANTS = {
    "top": (), "mix": ("--context", "mix", "--lstm", "allennlp"),
    "sgd": ("--optimizer", "sgd", "--learning-rate", "0.01"),
    "no boundaries": ("--no-boundaries",), "one layer": ("--num-layers", "1", "--cell-clip", "0.5"),
}


@pytest.fixture(scope="module")
def runs(small: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    return {name: train_alone(small, folder / name, "--max-steps", "3", *options) for name, options in VARIANTS.items()}


@pytest.fixture(scope="module")
def exported(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Return the exported models by variant and format."""
    folder = tmp_path_factory.mktemp("formats")
    found = {}
    for name in ("top", "mix", "no boundaries", "one layer"):
        for kind in ("elmo", "huggingface"):
            found[name, kind] = folder / f"{name} {kind}"
            export.main([str(runs[name]), "--output", str(found[name, kind]), "--format", kind], solo)
    return found


@pytest.mark.parametrize("tested", [loading, model, module, scores, stored], ids=lambda tested: tested.__name__)
def test_examples_of_docstrings(runs: dict[str, Path], tested: ModuleType) -> None:
    result = doctest.testmod(tested, extraglobs={"MODEL": str(runs["top"]), "load": lapse_elmo.load})
    assert result.failed == 0 and result.attempted > 0


def test_import_is_cheap_and_load_needs_no_mpi_no_server_and_no_compiler(runs: dict[str, Path]) -> None:
    program = (
        "import sys, lapse_elmo; assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        f"model = lapse_elmo.load({str(runs['top'])!r})\n"
        "model.embed(['w00 w01']); model.score(['w00']); model.nearest('w00'); model.fill('w00 w01', 0)\n"
        "assert 'mpi4py' not in sys.modules, 'MPI was loaded'\n"
    )
    environment = {"PATH": "/nonexistent", "PYTHONPATH": str(ROOT), "HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd="/", env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["top", "mix", "no boundaries", "one layer"])
def test_every_kind_of_folder_is_the_same_model(
    runs: dict[str, Path], exported: dict[tuple[str, str], Path], name: str
) -> None:
    run = lapse_elmo.load(runs[name])
    checkpoint = lapse_elmo.load(runs[name] / "best", verify=True)
    others = [lapse_elmo.load(exported[name, kind]) for kind in ("elmo", "huggingface")]
    vectors, scores = run.embed(LINES), run.score(LINES)
    for other in (checkpoint, *others):
        assert (other.num_layers, other.dimension) == (run.num_layers, run.dimension)
        assert list(other.vocabulary.words) == list(run.vocabulary.words)
        for found, wanted in zip(other.embed(LINES), vectors, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-6)
        for score, expected in zip(other.score(LINES), scores, strict=True):
            np.testing.assert_allclose(score.forward, expected.forward, atol=1e-5)
            np.testing.assert_allclose(score.backward, expected.backward, atol=1e-5)
            np.testing.assert_array_equal(score.unknown, expected.unknown)
        assert other.fill("w01 w02 w00", 1, 3)[0].word == run.fill("w01 w02 w00", 1, 3)[0].word


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_make_the_perplexity_of_bin_evaluate(
    small: Prepared, runs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    wanted = evaluate_alone(runs[name], tmp_path / "result.json")
    totals = Totals()
    for score in lapse_elmo.load(runs[name]).score(small.heldout, batch_size=7):
        totals.add(score)
    assert totals.num_targets == wanted["num_targets"]
    assert totals.forward_perplexity == pytest.approx(wanted["forward_perplexity"], rel=1e-5)
    assert totals.backward_perplexity == pytest.approx(wanted["backward_perplexity"], rel=1e-5)
    assert totals.perplexity == pytest.approx(wanted["mean_perplexity"], rel=1e-5)
    assert totals.num_characters == sum(len(line) + 1 for line in small.heldout)


def test_vectors_depend_neither_on_neighbours_nor_on_earlier_calls(runs: dict[str, Path]) -> None:
    trained = lapse_elmo.load(runs["top"])
    together = trained.embed(LINES * 40, batch_size=5)
    for _ in range(2):
        for line, found in zip(LINES, together, strict=False):
            np.testing.assert_allclose(trained.embed([line])[0], found, atol=1e-6)
    means = trained.sentence_vectors(LINES, "all")
    assert means.shape == (5, 3, 32) and not means[1].any()
    np.testing.assert_allclose(means[0], together[0].mean(1), atol=1e-6)
    np.testing.assert_allclose(trained.embed(LINES, "average")[0], together[0].mean(0), atol=1e-6)
    assert trained.sentence_vectors([]).shape == (0, 32)


def test_bfloat16_products_change_vectors_little(runs: dict[str, Path], tmp_path: Path) -> None:
    exact, near = (lapse_elmo.load(runs["top"], precision=precision).embed(LINES) for precision in ("fp32", "bf16"))
    assert any((one != other).any() for one, other in zip(exact, near, strict=True))
    for one, other in zip(exact, near, strict=True):
        assert np.linalg.norm(other - one) <= 2e-2 * np.linalg.norm(one)
    (tmp_path / "text").write_text("".join(f"{line}\n" for line in LINES))
    output = tmp_path / "vectors.hdf5"
    embed.main([str(runs["top"]), str(tmp_path / "text"), "--output", str(output), "--precision", "bf16"], solo)
    layer = lapse_elmo.load(runs["top"], precision="bf16").module()
    for vectors, wanted in zip(layer(layer.ids(LINES)).unbind(1), near, strict=True):
        np.testing.assert_allclose(vectors[:, : wanted.shape[1]].numpy(), wanted, atol=1e-5)
    with h5py.File(output) as file:
        for number, vectors in enumerate(near):
            np.testing.assert_array_equal(file[str(number)], vectors)


def test_an_unknown_word_is_marked_and_embedded_as_unknown(runs: dict[str, Path]) -> None:
    trained = lapse_elmo.load(runs["top"])
    score = trained.score(["w01 unheard <S> w00"])[0]
    assert score.unknown.tolist() == [False, True, True, False]
    np.testing.assert_array_equal(trained.embed(["w01 unheard"])[0], trained.embed(["w01 <UNK>"])[0])


def test_probabilities_of_fill_are_those_of_score(runs: dict[str, Path]) -> None:
    trained = lapse_elmo.load(runs["top"])
    words = ["w01", "w02", "w00", "w05"]
    score = trained.score([words])[0]
    everything = {found.word: found for found in trained.fill(words, 2, count=1000)}
    assert len(everything) == len(trained.vocabulary.words)
    assert everything["w00"].forward == pytest.approx(np.exp(score.forward[2]), rel=1e-4)
    assert everything["w00"].backward == pytest.approx(np.exp(score.backward[2]), rel=1e-4)
    assert 0.2 < sum(found.probability for found in everything.values()) <= 1.0001
    assert trained.fill(words, -2, 5) == trained.fill(words, 2, 5)
    open_ended = lapse_elmo.load(runs["no boundaries"]).fill(words, 0, 2)[0]
    assert np.isnan(open_ended.forward) and open_ended.probability == pytest.approx(open_ended.backward)


def test_nearest_is_cosine(runs: dict[str, Path]) -> None:
    trained = lapse_elmo.load(runs["top"])
    words = list(trained.vocabulary.words)
    for table, rows in (("embedding", trained.stored.embedding), ("softmax", trained.stored.softmax)):
        assert rows is not None
        array = rows.weights(np.arange(3, rows.num_rows))[:, :16].astype(np.float64)
        array /= np.linalg.norm(array, axis=1, keepdims=True)
        cosines = array @ array[words.index("w03")]
        wanted = [words[i] for i in np.argsort(-cosines) if words[i] != "w03"]
        found = trained.nearest("w03", len(words), table)
        assert [word for word, _ in found] == wanted
        assert found[0][1] == pytest.approx(np.sort(cosines)[-2], abs=1e-6)
    vector = trained.stored.embedding.weights(np.array([trained.vocabulary.encode(["w03"])[0] - 1]))[0]
    assert trained.nearest(vector, 1)[0][0] == "w03"
    for without_direction in (np.zeros_like(vector), np.full_like(vector, np.nan)):
        with pytest.raises(ValueError, match="finite numbers that are not all zero"):
            trained.nearest(without_direction)


def test_the_rows_of_many_ranks(small: Prepared, drive: Drive, tmp_path: Path) -> None:
    """A table in several files, in any order, reads like a table in one file."""
    argv = [*small.options, *TINY, "--max-steps", "3", "--run-dir", str(tmp_path / "run")]
    vectors = str(tmp_path / "vectors.hdf5")
    (tmp_path / "text").write_text("\n".join(LINES) + "\n")
    run, text = str(tmp_path / "run"), str(tmp_path / "text")
    outcome = drive(3, [("train", argv), ("embed", [run, text, "--output", vectors])])
    assert all(rank["error"] is None for case in outcome for rank in case), outcome
    totals = Totals()
    trained = lapse_elmo.load(tmp_path / "run")
    for score in trained.score(small.heldout):
        totals.add(score)
    wanted = evaluate_alone(tmp_path / "run", tmp_path / "result.json")
    assert totals.perplexity == pytest.approx(wanted["mean_perplexity"], rel=1e-5)
    with h5py.File(vectors, "r") as file:
        for number, expected in enumerate(trained.embed(LINES)):
            np.testing.assert_allclose(file[str(number)][()], expected, atol=1e-6)


def test_module(runs: dict[str, Path]) -> None:
    trained = lapse_elmo.load(runs["top"])
    layer = trained.module(requires_grad=True)
    ids = layer.ids([LINES[0], LINES[2], LINES[3]])
    found = layer.train()(ids)
    assert found.shape == (3, 3, 7, 32) and not found[:, 0, 3:].any() and not layer.bilm.training
    for row, wanted in enumerate(trained.embed([LINES[0], LINES[2], LINES[3]])):
        np.testing.assert_allclose(found[:, row, : wanted.shape[1]].detach().numpy(), wanted, atol=1e-6)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.bilm.parameters())
    assert not any("embedding" in name for name in layer.state_dict())
    frozen = trained.module("average")
    assert not frozen(ids).requires_grad and frozen(ids).shape == (3, 7, 32)
    for bad in (torch.zeros(2, 3), torch.tensor([[9999]]), torch.tensor([[0, 5]])):
        with pytest.raises(ValueError):
            layer(bad)


def test_bad_calls(runs: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="precision should be one of fp32, bf16, not 'bf17'"):
        lapse_elmo.load(runs["top"], precision="bf17")
    trained = lapse_elmo.load(runs["top"])
    for bad in ("one string", [3], [["w00", 3]], [b"w00"]):
        with pytest.raises(TypeError):
            trained.embed(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        trained.embed(["w00"], layers="last")
    with pytest.raises(CorpusError, match="not in the vocabulary"):
        trained.nearest("unheard")
    with pytest.raises(IndexError):
        trained.fill("w00", 1)
    assert trained.embed([]) == [] and trained.score([]) == []
    assert trained.embed(["w00 " * 10_000])[0].shape == (3, 10_000, 32)


def refused(path: Path, *says: str, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        lapse_elmo.load(path, **options)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and all(part in text for part in says), text


def test_what_is_no_model(runs: dict[str, Path], tmp_path: Path) -> None:
    refused(tmp_path / "gone", "there is no model")
    refused(tmp_path, "holds no model")
    refused(runs["top"] / "vocab.txt", "is a file")
    run = tmp_path / "run"
    shutil.copytree(runs["top"], run, symlinks=True)
    (run / "vocab.txt").write_text("\n".join(reversed((run / "vocab.txt").read_text().split())))
    refused(run, "trained with the vocabulary")
    rows = next((run / "checkpoints").glob("*/table-embedding-*.h5"))
    rows.unlink()
    refused(run, "table-embedding-00000-of-00001.h5", "missing or damaged")
    (rows.parent / "manifest.json").write_text('{"format": "lapse-elmo checkpoint", "version": 99}')
    refused(run, "99")


def changed(source: Path, target: Path, edit: Any) -> Path:
    """Copy an export in bilm-tf's format, with changed weights."""
    shutil.copytree(source, target)
    with h5py.File(target / "weights.hdf5", "r+") as file:
        edit(file)
    return target


def replace(file: h5py.File, name: str, array: np.ndarray | None) -> None:
    del file[name]
    if array is not None:
        file[name] = array


def test_bad_exports(exported: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    source = exported["top", "elmo"]
    cell = "RNN_0/RNN/MultiRNNCell/Cell1/LSTMCell"
    bad = {
        "projection": (lambda file: replace(file, f"{cell}/W_P_0", np.zeros((32, 15), np.float32)), "W_P_0 has shape"),
        "no cell": (lambda file: replace(file, f"{cell}/W_0", None), "has no RNN_0"),
        "rows": (lambda file: replace(file, "embedding", np.zeros((9, 16), np.float32)), "the embedding has 9 rows"),
        "bias": (lambda file: replace(file, "softmax/b", np.zeros(3, np.float32)), "softmax/b has shape"),
        "flat": (lambda file: replace(file, "embedding", np.zeros(9, np.float32)), "expected (words, size)"),
    }
    for name, (edit, says) in bad.items():
        refused(changed(source, tmp_path / name, edit), says)
    for name in ("options.json", "weights.hdf5", "vocab.txt"):
        lacking = tmp_path / f"no {name}"
        shutil.copytree(source, lacking)
        (lacking / name).unlink()
        refused(lacking, f"no {name}")
    characters = tmp_path / "characters"
    shutil.copytree(source, characters)
    options = json.loads((characters / "options.json").read_text())
    (characters / "options.json").write_text(json.dumps({**options, "char_cnn": {"n_characters": 262}}))
    refused(characters, "character-CNN model")
    (characters / "options.json").write_text(json.dumps({**options, "lapse_elmo": {"version": 9}}))
    refused(characters, "newer lapse-elmo")
    (characters / "options.json").write_text("{}")
    refused(characters, "not the options of a bilm-tf model")
    words = (source / "vocab.txt").read_text().split()
    refused(source, "not the vocabulary", vocab=written(tmp_path / "order", [*words[:3], *reversed(words[3:])]))
    (characters / "options.json").write_text(json.dumps({k: v for k, v in options.items() if k != "lapse_elmo"}))
    refused(characters, "give its own vocabulary", vocab=written(tmp_path / "short", words[:9]))
    refused(characters, "has no </S>", vocab=written(tmp_path / "without", [words[0], *words[2:]]))


def written(path: Path, words: list[str]) -> Path:
    path.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    return path


def test_a_safetensors_file_that_lies(exported: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    source = exported["top", "huggingface"]
    data = (source / "model.safetensors").read_bytes()
    lies = {
        "longer": data.replace(b'"shape":[44,16]', b'"shape":[99,16]', 1), "short": data[:-100],
        "header": b"\xff" * 8 + data[8:], "other": data.replace(b"softmax.bias", b"softmaX.bias", 1),
    }
    assert lies["longer"] != data
    for name, content in lies.items():
        folder = tmp_path / name
        shutil.copytree(source, folder)
        (folder / "model.safetensors").write_bytes(content)
        refused(folder, "damaged")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    refused(folder, "of type 'bert'")


def test_words_and_format_of_a_huggingface_folder(exported: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(exported["top", "huggingface"], folder)
    words = list(lapse_elmo.load(folder).vocabulary.words)
    lines = (folder / "vocab.txt").read_text().split()
    assert lines == ["<S>", "</S>", "<UNK>", *words]
    written(folder / "vocab.txt", [*lines[:3], *reversed(words)])
    refused(folder, "not the vocabulary")
    (folder / "vocab.txt").unlink()
    assert list(lapse_elmo.load(folder).vocabulary.words) == words, "from tokenizer.json"
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 2}}}')
    refused(folder, "ids with gaps")
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer.json: [Errno 2]")
    written(folder / "vocab.txt", lines)
    assert list(lapse_elmo.load(folder).vocabulary.words) == words, "from vocab.txt alone"
    config = json.loads((folder / "config.json").read_text())
    for own, says in (({"version": 2}, "newer lapse-elmo"), ({"version": "2"}, "has no version"), ([], "damaged")):
        (folder / "config.json").write_text(json.dumps({**config, "lapse_elmo": own}))
        refused(folder, says)


def test_bilm_tfs_own_files(exported: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """As dump_weights and dump_token_embeddings leave them: no softmax, a file of word vectors, specials anywhere."""
    source = exported["top", "elmo"]
    folder = tmp_path / "bilm"
    folder.mkdir()
    options = json.loads((source / "options.json").read_text())
    del options["lapse_elmo"]
    (folder / "my_options.json").write_text(json.dumps(options))
    words = (source / "vocab.txt").read_text().split()
    moved = [*words[3:5], words[1], words[2], *words[5:], words[0]]
    written(folder / "vocab-2016.txt", moved)
    with h5py.File(source / "weights.hdf5", "r") as old, h5py.File(folder / "my_weights.hdf5", "w") as new:
        for name in ("RNN_0", "RNN_1"):
            old.copy(name, new)
        with h5py.File(folder / "my_embedding.hdf5", "w") as other:
            rows = [words.index(word) for word in moved]
            other.create_dataset("embedding", data=old["embedding"][()][rows].astype("float64"), compression="gzip")
    trained, wanted = lapse_elmo.load(folder), lapse_elmo.load(source)
    for found, expected in zip(trained.embed(LINES), wanted.embed(LINES), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(CheckpointError, match="without a softmax"):
        trained.score(["w00"])
    assert trained.nearest("w00", 3) == wanted.nearest("w00", 3)


def test_bilm_tf_of_one_layer(exported: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """Its dump_weights writes no MultiRNNCell for a single layer."""
    folder = shutil.copytree(exported["one layer", "elmo"], tmp_path / "bilm")
    with h5py.File(folder / "weights.hdf5", "r+") as file:
        for direction in (0, 1):
            file.move(f"RNN_{direction}/RNN/MultiRNNCell/Cell0/LSTMCell", f"RNN_{direction}/RNN/LSTMCell")
            del file[f"RNN_{direction}/RNN/MultiRNNCell"]
    found, wanted = (lapse_elmo.load(path).embed(LINES) for path in (folder, exported["one layer", "elmo"]))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_bilm_tf_without_a_projection(small: Prepared, tmp_path: Path) -> None:
    """If D equals C, bilm-tf writes no W_P_0, and the identity replaces it."""
    run = train_alone(small, tmp_path / "run", "--max-steps", "1", "--cell-size", "16")
    export.main([str(run), "--output", str(tmp_path / "elmo")], solo)

    def unit(file: h5py.File, present: bool) -> None:
        for direction in (0, 1):
            for layer in (0, 1):
                name = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell/W_P_0"
                replace(file, name, np.eye(16, dtype=np.float32) if present else None)

    there = changed(tmp_path / "elmo", tmp_path / "there", lambda file: unit(file, True))
    lacking = changed(tmp_path / "elmo", tmp_path / "lacking", lambda file: unit(file, False))
    for found, wanted in zip(*(lapse_elmo.load(folder).embed(LINES) for folder in (lacking, there)), strict=True):
        np.testing.assert_array_equal(found, wanted)
