"""Read models in bilm-tf's format: those that ``bin/export`` writes, and bilm-tf's own models of word vectors.

A directory holds ``options.json``, ``weights.hdf5`` and ``vocab.txt``, or exactly one file of each of
``*options*.json``, ``*weights*.hdf5`` and ``*vocab*.txt``. :mod:`lapse_elmo.export.elmo` describes the layout of the
weights. Files of bilm-tf differ in three ways, which are supported: ``dump_weights`` omits the softmax, so the model
can embed but not score; ``dump_token_embeddings`` writes ``embedding`` to a separate file (the only
``*embedding*.hdf5``); and there is no projection unless D is smaller than C.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lapse_elmo.corpus.files import H5_ERRORS
from lapse_elmo.corpus.vocabulary import SPECIAL, Vocabulary
from lapse_elmo.errors import CheckpointError, ConfigError
from lapse_elmo.inputs import MOST_JSON_BYTES, read_small, require_regular
from lapse_elmo.model.bilm import BiLMOptions
from lapse_elmo.trained.stored import ArrayTable, StoredModel, mapped, own_entries

#: The version of the table of ``options.json`` with lapse-elmo's own entries.
OWN_VERSION = 1


def holds_elmo_files(folder: Path) -> bool:
    """Return whether ``folder`` looks like a model in bilm-tf's format."""
    return any(folder.glob("*options*.json")) or any(folder.glob("*weights*.hdf5"))


def open_elmo_files(
    folder: Path, vocab: str | os.PathLike[str] = "", embedding: str | os.PathLike[str] = ""
) -> StoredModel:
    """Open the model in a directory.

    Args:
        folder: The directory.
        vocab: The vocabulary file, if it is not in the directory.
        embedding: The file of ``dump_token_embeddings``, if it is not in the directory.

    Raises:
        CheckpointError: If a file is missing or ambiguous, a shape contradicts the options, the vocabulary belongs to
            another model, or the model has a character CNN.
    """
    options_file = _the_only(folder, "options.json", "*options*.json")
    options = _read_options(options_file)
    own = own_entries(options, OWN_VERSION, options_file)
    weights = _the_only(folder, "weights.hdf5", "*weights*.hdf5")
    vocabulary_file = Path(vocab) if vocab else _the_only(folder, "vocab.txt", "*vocab*.txt")
    vocabulary = Vocabulary.load(vocabulary_file)
    if own.get("vocabulary_sha256", vocabulary.sha256) != vocabulary.sha256:
        raise CheckpointError(
            f"{vocabulary_file} is not the vocabulary that {folder} was written with (different words or order)"
        )
    order = line_order(vocabulary, vocabulary_file)
    stored = options.get("n_tokens_vocab", vocabulary.size)
    if stored != vocabulary.size:
        raise CheckpointError(
            f"{vocabulary_file} has {vocabulary.size:,} words including <S>, </S> and <UNK>, but the model in {folder} "
            f"has {stored:,}: give its own vocabulary"
        )
    try:
        require_regular(weights)
        with h5py.File(weights, "r") as file:
            if "char_cnn" in options or "CNN" in file or "char_embed" in file:
                raise _characters(folder)
            sizes = _sizes(options, folder, "mix" if "mix" in file else "top")
            _check_dense(file, sizes, weights)
            content = np.memmap(weights, np.uint8, "r")
            softmax = _softmax(file, content, weights, order)
            table = _table(file, content, "embedding", weights) if "embedding" in file and not embedding else None
            dense = _map_dense(file, content, sizes)
        if table is None:
            other = Path(embedding) if embedding else _the_only(folder, "embedding.hdf5", "*embedding*.hdf5")
            require_regular(other)
            with h5py.File(other, "r") as file:
                table = _table(file, np.memmap(other, np.uint8, "r"), "embedding", other)
    except H5_ERRORS as error:
        raise CheckpointError(f"cannot read the weights in {folder}: {error}") from None
    about = {"num_train_tokens": options.get("n_train_tokens"), **own}
    return StoredModel(
        folder, "bilm-tf files", sizes, own.get("boundaries", True), vocabulary, ArrayTable(table, order=order),
        softmax, lambda: _read_dense(sizes, dense), about,
    )


def _the_only(folder: Path, name: str, pattern: str) -> Path:
    if (folder / name).is_file():
        return folder / name
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        what = f"{len(found)} files {pattern}" if found else f"no {name}"
        raise CheckpointError(f"{folder} has {what}: a model in bilm-tf's format has exactly one")
    return found[0]


def _read_options(path: Path) -> dict[str, Any]:
    try:
        options = json.loads(read_small(path, MOST_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(options, dict) or not isinstance(options.get("lstm"), dict):
        raise CheckpointError(f"{path} has no table 'lstm': it is not the options of a bilm-tf model")
    if "char_cnn" in options:
        raise _characters(path.parent)
    return options


def _characters(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} is a character-CNN model (the original ELMo): lapse-elmo reads only models with word vectors; use "
        "AllenNLP's Elmo instead"
    )


def _sizes(options: dict[str, Any], folder: Path, context: str) -> BiLMOptions:
    lstm = options["lstm"]
    try:
        layers = int(lstm["n_layers"])
        if not options.get("bidirectional", False):
            raise CheckpointError(f"{folder} is a unidirectional model: lapse-elmo reads only bidirectional ones")
        if layers > 1 and not lstm.get("use_skip_connections", False):
            raise CheckpointError(f"{folder} has no skip connections between layers, which lapse-elmo requires")
        return BiLMOptions(
            projection_size=int(lstm["projection_dim"]), cell_size=int(lstm["dim"]), num_layers=layers,
            cell_clip=float(lstm.get("cell_clip") or 0), projection_clip=float(lstm.get("proj_clip") or 0),
            context=context, dropout=0.0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the options of {folder} have no usable {error} in 'lstm'") from None
    except ConfigError as error:
        raise CheckpointError(f"the options of {folder} are invalid: {error}") from None


def line_order(vocabulary: Vocabulary, path: Path) -> np.ndarray | None:
    """Return the line of each class in the vocabulary file.

    Returns:
        (V,) int64 line numbers, counted from 0; None if class i is in line i.

    Raises:
        CheckpointError: If a special token is missing; bilm-tf's tables have a row for each of them.
    """
    lines = vocabulary.special_lines()
    if None in lines:
        missing = SPECIAL[lines.index(None)]
        raise CheckpointError(f"{path} has no {missing}, unlike any bilm-tf vocabulary: give the model's own")
    if lines == [0, 1, 2]:
        return None
    others = np.setdiff1d(np.arange(vocabulary.size), np.array(lines, np.int64), assume_unique=True)
    return np.concatenate([np.array(lines, np.int64), others])


def _table(file: h5py.File, content: np.ndarray, name: str, path: Path) -> np.ndarray:
    """Return a dataset (V, D), memory-mapped if possible."""
    dataset = file[name]
    if dataset.ndim != 2:
        raise CheckpointError(f"{path}: {name} has shape {dataset.shape}, expected (words, size)")
    return mapped(dataset, content)


def _softmax(file: h5py.File, content: np.ndarray, path: Path, order: np.ndarray | None) -> ArrayTable | None:
    if "softmax/W" not in file:
        return None
    array, bias = _table(file, content, "softmax/W", path), file["softmax/b"][:]
    if bias.shape != array.shape[:1]:
        raise CheckpointError(f"{path}: softmax/b has shape {bias.shape}, expected {array.shape[:1]}")
    return ArrayTable(array, bias, order)


def _groups(sizes: BiLMOptions, file: h5py.File) -> Iterator[tuple[str, str]]:
    """Yield our parameter prefix and bilm-tf's HDF5 group for each direction and layer."""
    for direction, name in enumerate(("forward", "backward")):
        for layer in range(sizes.num_layers):
            group = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            # bilm-tf makes no MultiRNNCell of a single layer, although its own reader expects one.
            single = f"RNN_{direction}/RNN/LSTMCell"
            yield f"lstm.{name}_layer_{layer}", single if sizes.num_layers == 1 and single in file else group


def _check_dense(file: h5py.File, sizes: BiLMOptions, path: Path) -> None:
    """Check the shapes of the LSTM's weights against the options, without reading the weights."""
    size, cell = sizes.projection_size, sizes.cell_size
    shapes = {"W_0": (2 * size, 4 * cell), "B": (4 * cell,), "W_P_0": (cell, size)}
    for _, group in _groups(sizes, file):
        if f"{group}/W_0" not in file:
            raise CheckpointError(f"{path} has no {group}/W_0: not bilm-tf weights of {sizes.num_layers} layers")
        if f"{group}/W_P_0" not in file and size != cell:
            raise CheckpointError(f"{path} has no {group}/W_P_0, the projection from {cell} to {size}")
        for name, shape in shapes.items():
            if f"{group}/{name}" in file and file[f"{group}/{name}"].shape != shape:
                raise CheckpointError(
                    f"{path}: {group}/{name} has shape {file[f'{group}/{name}'].shape}, expected {shape} by the options"
                )


def _map_dense(file: h5py.File, content: np.ndarray, sizes: BiLMOptions) -> dict[str, np.ndarray]:
    """Return the LSTM's weights as stored, memory-mapped: by our prefix and bilm-tf's name, ``mix/`` as in the file."""
    found = {
        f"{prefix}/{name}": mapped(file[f"{group}/{name}"], content)
        for prefix, group in _groups(sizes, file) for name in ("W_0", "B", "W_P_0")
        if name != "W_P_0" or f"{group}/{name}" in file
    }
    if sizes.context == "mix":
        found |= {f"mix/{name}": mapped(file[f"mix/{name}"], content) for name in ("scalars", "gamma")}
    return found


def _read_dense(sizes: BiLMOptions, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the LSTM's parameters under the names of :class:`~lapse_elmo.model.lstm.FusedElmoLstm`."""
    size, cell = sizes.projection_size, sizes.cell_size
    found: dict[str, np.ndarray] = {}
    for prefix in (name.removesuffix("/W_0") for name in stored if name.endswith("/W_0")):
        gates = reordered(stored[f"{prefix}/W_0"].T)
        bias = reordered(stored[f"{prefix}/B"])
        bias[cell : 2 * cell] += 1
        projection = np.eye(size, dtype=np.float32)  # bilm-tf omits the projection unless D < C
        if f"{prefix}/W_P_0" in stored:
            projection = np.array(stored[f"{prefix}/W_P_0"].T)
        found[f"{prefix}.input_linearity.weight"] = gates[:, :size]
        found[f"{prefix}.state_linearity.weight"] = gates[:, size:]
        found[f"{prefix}.state_linearity.bias"] = bias
        found[f"{prefix}.state_projection.weight"] = projection
    if sizes.context == "mix":
        found |= {name.replace("/", "."): np.array(stored[name]) for name in ("mix/scalars", "mix/gamma")}
    return found


def reordered(gates: np.ndarray) -> np.ndarray:
    """Convert blocks of gates along the first axis from bilm-tf's order i, g, f, o to ours, i, f, g, o, or back."""
    first, second, third, fourth = np.split(gates, 4)
    return np.concatenate([first, third, second, fourth])
