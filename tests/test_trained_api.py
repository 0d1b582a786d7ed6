"""The Python interface to trained models, as far as it needs no model."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lapse_elmo import trained
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.errors import CheckpointError
from lapse_elmo.export import elmo, huggingface
from lapse_elmo.model.bilm import BiLM, BiLMOptions
from lapse_elmo.rounds import take_windows
from lapse_elmo.trained import SentenceScore, StoredModel, Totals, module, opening
from lapse_elmo.trained.opening import open_stored
from lapse_elmo.trained.stored import ArrayTable
from lapse_elmo.trained.targets import TargetVectors

OLD_RUN = Path(__file__).parent / "training" / "version_2" / "one"


def stored_model(seed: int, **sizes: Any) -> StoredModel:
    options = BiLMOptions(projection_size=2, cell_size=3, num_layers=1, **sizes)
    model = BiLM(options, torch.Generator().manual_seed(seed))
    dense = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    rows = np.full((5, 2), seed, np.float32)
    return StoredModel(
        Path("in memory"), "none", options, True, Vocabulary.from_words(["a", "b"]), ArrayTable(rows),
        ArrayTable(rows, rows[:, 0]), lambda: dense,
    )


def test_every_public_class_and_method_has_an_example() -> None:
    named = [getattr(trained, name) for name in trained.__all__ if name != "LAYERS"]
    assert len(named) == 6
    for owner in (trained.TrainedModel, module.ElmoModule):
        found = {name: item for name, item in vars(owner).items() if not name.startswith("_") and item.__doc__}
        assert len(found) > 3
        named += [owner, *found.values()]
    lacking = [item for item in named if ">>>" not in item.__doc__]
    assert lacking == []


def test_bits_per_character_of_different_vocabularies() -> None:
    """By hand: 7 distinct characters and an end of word are log2(8) = 3 bits each; the text has 3 + 6 characters."""
    def totals(unknown: list[bool], probabilities: list[float], end: float) -> Totals:
        logs, found = np.log(probabilities), Totals()
        found.add(SentenceScore(("ab", "cdefg"), np.array(unknown), logs, logs, float(np.log(end)), float(np.log(end))))
        return found

    known = totals([False, False], [1 / 4, 1 / 16], 1 / 2)
    assert known.spelling_bits_per_character == 0 and known.bits_per_character == pytest.approx((2 + 4 + 1) / 9)
    half = totals([False, True], [1 / 4, 1 / 2], 1 / 2)
    assert half.spelling_bits_per_character == pytest.approx((5 + 1) * 3 / 9)
    assert half.bits_per_character == pytest.approx((2 + 1 + 1 + 18) / 9)
    nothing = totals([True, True], [1, 1], 1)  # a model that knows no word, and is sure of that
    assert nothing.perplexity == 1 and nothing.bits_per_character == pytest.approx((3 + 6) * 3 / 9)
    assert np.isnan(Totals().bits_per_character) and np.isnan(Totals().spelling_bits_per_character)


def test_an_export_without_clipping_does_not_clip_to_zero(tmp_path: Path) -> None:
    """TensorFlow's cell, which bilm-tf uses, leaves out the clip for null alone; for 0 all its outputs would be 0."""
    stored = stored_model(1, cell_clip=0.0, projection_clip=0.0)
    lstm = elmo.bilm_options(stored, stored.vocabulary)["lstm"]
    assert (lstm["cell_clip"], lstm["proj_clip"]) == (None, None)
    elmo.write(stored, tmp_path / "out", overwrite=False)
    again = open_stored(tmp_path / "out").options
    assert (again.cell_clip, again.projection_clip) == (0.0, 0.0)


def test_files_that_are_named_are_not_ignored(tmp_path: Path) -> None:
    stored = stored_model(1)
    huggingface.write(stored, tmp_path / "hub", overwrite=False)
    own, other = tmp_path / "own.txt", tmp_path / "other.txt"
    stored.vocabulary.save(own)
    Vocabulary.from_words(["b", "a"]).save(other)
    assert open_stored(tmp_path / "hub", vocab=own).vocabulary.words == ["a", "b"]
    with pytest.raises(CheckpointError, match=r"other.txt is not the vocabulary of .*hub"):
        open_stored(tmp_path / "hub", vocab=other)
    elmo.write(stored, tmp_path / "elmo", overwrite=False)
    with h5py.File(tmp_path / "vectors.hdf5", "w") as file:
        file["embedding"] = np.full((5, 2), 7, np.float32)
    opened = open_stored(tmp_path / "elmo", embedding=tmp_path / "vectors.hdf5")
    assert (opened.embedding.weights(np.arange(5)) == 7).all()


@pytest.mark.parametrize("format_", [elmo, huggingface])
def test_an_opened_export_stays_the_same_when_it_is_replaced(tmp_path: Path, format_: Any) -> None:
    """Its tables are mapped at once, so its LSTM, which is read later, must not be that of the new files."""
    old = stored_model(1, context="mix")
    format_.write(old, tmp_path / "out", overwrite=False)
    opened = open_stored(tmp_path / "out")
    assert opened.kind == ("bilm-tf files" if format_ is elmo else "Hugging Face directory")
    format_.write(stored_model(2, context="mix"), tmp_path / "out", overwrite=True)
    np.testing.assert_array_equal(opened.embedding.weights(np.arange(5)), old.embedding.weights(np.arange(5)))
    assert opened.dense.keys() == old.dense.keys()
    for name, array in old.dense.items():
        np.testing.assert_allclose(opened.dense[name], array, atol=1e-6)
    assert not opened.bilm().training


def test_an_opened_checkpoint_can_be_removed(tmp_path: Path) -> None:
    """A run that trains on removes its older checkpoints."""
    shutil.copytree(OLD_RUN, tmp_path / "run")
    opened = open_stored(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    expected = open_stored(OLD_RUN).dense
    assert opened.dense.keys() == expected.keys() and expected
    for name, array in expected.items():
        np.testing.assert_array_equal(opened.dense[name], array)
    assert not opened.bilm().training


def test_a_pickled_model_has_the_files_that_were_given_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary and word vectors that lie elsewhere; a path that holds another model meanwhile is told."""
    elmo.write(stored_model(1), tmp_path / "elmo", False)
    (tmp_path / "elmo" / "vocab.txt").rename(tmp_path / "words")
    with h5py.File(tmp_path / "vectors.hdf5", "w") as file:
        file["embedding"] = np.full((5, 2), 8, np.float32)
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(open_stored(Path("elmo"), vocab="words", embedding="vectors.hdf5"))
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    assert list(again.vocabulary.words) == ["a", "b"] and (again.embedding.weights(np.arange(5)) == 8).all()
    data = pickle.dumps(trained.load(OLD_RUN))
    huggingface.write(stored_model(1), tmp_path / "hub", False)
    monkeypatch.setattr(opening, "open_checkpoint", lambda *_: open_stored(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match="not the model that was pickled"):
        pickle.loads(data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_export_that_transformers_has_saved_in_fewer_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    huggingface.write(stored_model(1), tmp_path / "hub", False)
    weights, wanted = tmp_path / "hub" / "model.safetensors", trained.load(tmp_path / "hub").embed(["a b"])
    save_file({name: tensor.to(dtype) for name, tensor in load_file(weights).items()}, weights)
    np.testing.assert_allclose(trained.load(tmp_path / "hub").embed(["a b"]), wanted, atol=2e-2)


def test_a_module_trains_all_of_its_parameters() -> None:
    """DistributedDataParallel refuses a module with parameters that have no gradient."""
    layer = module.ElmoModule(stored_model(1, context="mix"), layers="top", requires_grad=True)
    layer(torch.tensor([[4, 5]])).sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in layer.parameters())


def test_a_mix_begins_as_the_average_and_learns() -> None:
    stored, ids = stored_model(2), torch.tensor([[4, 5, 4]])
    layer = module.ElmoModule(stored, layers="mix")
    torch.testing.assert_close(layer(ids), module.ElmoModule(stored, layers="average")(ids))
    layer(ids).square().sum().backward()
    assert layer.mix is not None and layer.mix.scalars.grad is not None and bool(layer.mix.scalars.grad.any())
    assert {name for name in layer.state_dict() if name.startswith("mix.")} == {"mix.scalars", "mix.gamma"}


def test_a_replica_of_data_parallel_needs_no_parameters() -> None:
    """``nn.DataParallel`` makes replicas whose weights are attributes, not parameters, as here on the CPU."""
    layer = module.ElmoModule(stored_model(1))
    wanted = layer(torch.tensor([[4, 5]]))
    for part in layer.bilm.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            setattr(part, name, weight.detach())
    assert not list(layer.parameters()) and torch.equal(layer(torch.tensor([[4, 5]])), wanted)


def test_models_are_pickled_as_the_path_of_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As workers that are spawned and ``torch.save`` of a network do."""
    shutil.copytree(OLD_RUN, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    opened = trained.load("run")
    layer = opened.module("top", requires_grad=True)
    with torch.no_grad():
        layer.bilm.lstm.cell(0, 0).state_linearity.bias.add_(1)  # type: ignore[operator]
    data = pickle.dumps((opened, layer))
    assert len(data) < 50_000  # neither the tables nor the words
    monkeypatch.chdir("/")
    again, layer_again = pickle.loads(data)
    words = list(opened.vocabulary.words[:3])
    np.testing.assert_array_equal(again.embed([words])[0], opened.embed([words])[0])
    assert torch.equal(layer_again(layer.ids([words])), layer(layer.ids([words])))
    copied = copy.deepcopy(layer)
    assert copied.stored is layer.stored and copied.bilm is not layer.bilm
    faster = pickle.loads(pickle.dumps(trained.load(tmp_path / "run", precision="bf16")))
    assert faster.precision == "bf16"
    shutil.rmtree(tmp_path / "run")
    assert torch.equal(copied(layer.ids([words])), layer(layer.ids([words])))
    with pytest.raises(CheckpointError, match="there is no model"):
        pickle.loads(data)
    with pytest.raises(TypeError, match="it was not opened by"):
        pickle.dumps(stored_model(1))


def test_an_archive_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def noted(handle: int) -> None:
        fsync(handle)
        synced.append(os.fstat(handle).st_size)

    monkeypatch.setattr(os, "fsync", noted)
    with TargetVectors(tmp_path / "a.npz", ["a", "b"], (2,)) as archive:
        archive.add(["a", "c", "a"], np.arange(4, dtype=np.float32).reshape(2, 2))
    assert synced == [(tmp_path / "a.npz").stat().st_size]
    with np.load(tmp_path / "a.npz") as found:
        assert found["a"].tolist() == [[0, 1], [2, 3]] and found["b"].shape == (0, 2)


def test_ranks_keep_the_lines_that_they_need() -> None:
    windows = [[["a", "b"]], [["c"], []], [["d"]]]
    source = iter(windows)
    world: Any = SimpleNamespace(rank=0, size=2)
    for expected in (windows[:2], windows[2:], []):
        assert take_windows(source, world).windows == expected
    world.rank = 1
    source = iter(windows)
    for lines, words, expected in ((3, 3, windows[1:2]), (1, 1, []), (0, 0, [])):
        taken = take_windows(source, world)
        assert (taken.windows, taken.num_lines, taken.num_words) == (expected, lines, words)
