"""Open a saved model of any kind: a run, a checkpoint, a model in bilm-tf's format or a Hugging Face directory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

import h5py
import numpy as np

from lapse_elmo.checkpoint import (
    FOLDER,
    MANIFEST,
    Manifest,
    OpenFiles,
    SavedTable,
    check_files,
    config_of,
    find,
    read_manifest,
    require_vocabulary,
    verified,
    vocabulary_path,
)
from lapse_elmo.checkpoint.manifest import DENSE
from lapse_elmo.corpus.files import H5_ERRORS
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.errors import CheckpointError
from lapse_elmo.model.bilm import BiLMOptions
from lapse_elmo.mpi.world import World
from lapse_elmo.trained.elmo_files import holds_elmo_files, open_elmo_files
from lapse_elmo.trained.huggingface_files import holds_huggingface_files, open_huggingface_files
from lapse_elmo.trained.stored import StoredModel, mapped


def open_stored(
    path: str | os.PathLike[str], *, vocab: str | os.PathLike[str] = "", embedding: str | os.PathLike[str] = "",
    verify: bool = False,
) -> StoredModel:
    """Open the model at ``path``; :func:`lapse_elmo.load` documents the arguments.

    Raises:
        CheckpointError: If there is no model, or it is damaged, incomplete or of an unsupported kind.
    """
    folder = Path(path)
    if not folder.exists():
        raise CheckpointError(f"there is no model at {folder}: give the directory of a run, a checkpoint or an export")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give the directory of a run, a checkpoint or an export")
    if _holds_checkpoint(folder):
        stored = open_checkpoint(folder, vocab, verify)
    elif holds_huggingface_files(folder):
        stored = open_huggingface_files(folder, vocab)
    elif holds_elmo_files(folder):
        stored = open_elmo_files(folder, vocab, embedding)
    else:
        raise _no_model(folder)
    files = tuple(os.path.abspath(file) if file else "" for file in (stored.path, vocab, embedding))
    object.__setattr__(stored, "reopen", (_reopened, (*files, stored.vocabulary.sha256)))
    return stored


def _reopened(path: str, vocab: str, embedding: str, vocabulary_sha256: str) -> StoredModel:
    """Open the files of a pickled model."""
    stored = open_stored(path, vocab=vocab, embedding=embedding)
    if stored.vocabulary.sha256 != vocabulary_sha256:
        raise CheckpointError(f"{path} is not the model that was pickled: it has another vocabulary")
    return stored


def _no_model(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} holds no model: expected a run ({FOLDER}/step-*), a checkpoint ({MANIFEST}), bilm-tf's files "
        "(options.json, weights.hdf5, vocab.txt) or a Hugging Face directory (config.json, model.safetensors)"
    )


def open_checkpoint(
    folder: Path, vocab: str | os.PathLike[str] = "", verify: bool = False, manifest: Manifest | None = None,
    files: OpenFiles | None = None,
) -> StoredModel:
    """Open the newest checkpoint of a run, or a single checkpoint.

    Args:
        folder: The directory of the run or of the checkpoint.
        vocab: The vocabulary file, if it has been moved.
        verify: Whether to check the checksums first, which reads the whole checkpoint.
        manifest: The manifest, if it has been read.
        files: The files of the checkpoint that are open; the others are added. None closes all in the end.

    Raises:
        CheckpointError: If there is no checkpoint, it is damaged, or the vocabulary is another one.
    """
    path = find(folder)
    manifest = read_manifest(path) if manifest is None else manifest
    if verify:
        check_files(path, manifest)
    config = config_of(manifest, path)
    vocabulary = Vocabulary.load(vocab or vocabulary_path(path, config))
    require_vocabulary(manifest, vocabulary, path)
    # Options that affect only training keep their defaults.
    names = {field.name for field in dataclasses.fields(BiLMOptions)} - {"lstm", "precision", "stateful"}
    options = BiLMOptions(**{name: value for name, value in vars(config.model).items() if name in names})
    size = options.projection_size
    about = {name: manifest.get(name) for name in ("step", "num_train_tokens", "results", "versions", "config")}
    about["num_trained_tokens"] = (manifest.get("milestones") or {}).get("num_tokens")
    with contextlib.nullcontext(files) if files is not None else OpenFiles(path) as opened:
        embedding = SavedTable(opened, manifest, "embedding", vocabulary.size, size)
        softmax = SavedTable(opened, manifest, "softmax", vocabulary.size, size + 1)
        dense = _map_dense(opened, path / DENSE)
    return StoredModel(
        path, "checkpoint", options, config.data.boundaries, vocabulary, embedding, softmax,
        lambda: {name: np.array(array) for name, array in dense.items()}, about,
    )


def _map_dense(files: OpenFiles, path: Path) -> dict[str, np.ndarray]:
    """Return the dense parameters by name, memory-mapped.

    Mapped at once, as the tables are, although they are read later: a run that trains on removes the checkpoint.
    """
    found: dict[str, np.ndarray] = {}

    def add(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = mapped(item, content)

    try:
        stored = files.get(DENSE)
        content = np.memmap(stored, np.uint8, "r")
        with h5py.File(stored, "r") as file:
            file["parameters"].visititems(add)
    except H5_ERRORS as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    return found


def open_together(path: str, vocab: str, world: World) -> StoredModel:
    """Open a model on every rank (collective); the ranks divide the verification of a checkpoint among themselves.

    The ranks of a node map the same files, so the tables are in its memory only once.
    """
    folder = Path(path)
    if world.agree(lambda: _holds_checkpoint(folder)):
        checkpoint = world.agree(lambda: find(folder))
        with OpenFiles(checkpoint) as files:  # a rank maps the tables from the files that it has verified
            manifest = verified(files, world)
            return world.together(lambda: open_checkpoint(checkpoint, vocab, manifest=manifest, files=files))
    return world.together(lambda: open_stored(folder, vocab=vocab))


def _holds_checkpoint(folder: Path) -> bool:
    """Return whether ``folder`` looks like a checkpoint, or like a run, which has a folder of them."""
    return (folder / MANIFEST).is_file() or (folder / FOLDER).is_dir()
