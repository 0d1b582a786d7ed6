"""Models in bilm-tf's files: what ``bin/export`` writes, and token models of bilm-tf itself.

A folder holds ``options.json``, ``weights.hdf5`` and ``vocab.txt``, or the only ``*options*.json``, ``*weights*.hdf5``
and ``*vocab*.txt``. The layout of the weights is that of :mod:`lapse_elmo.export.elmo`. What bilm-tf writes differs in
three ways, which are read too: its ``dump_weights`` leaves the softmax out (such a model embeds but does not score),
its ``dump_token_embeddings`` puts ``embedding`` into a file of its own (the only ``*embedding*.hdf5``), and where D is
not smaller than C it has no projection.
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
from lapse_elmo.trained.stored import ArrayTable, StoredModel

#: The table of ``options.json`` that only lapse-elmo writes: what bilm-tf's options cannot say.
OWN, OWN_VERSION = "lapse_elmo", 1


def holds_elmo_files(folder: Path) -> bool:
    """Whether ``folder`` looks like a model in bilm-tf's files."""
    return any(folder.glob("*options*.json")) or any(folder.glob("*weights*.hdf5"))


def open_elmo_files(
    folder: Path, vocab: str | os.PathLike[str] = "", embedding: str | os.PathLike[str] = ""
) -> StoredModel:
    """Return the model in ``folder``; ``vocab`` and ``embedding`` name files that lie elsewhere.

    Raises:
        CheckpointError: If a file is missing or ambiguous, a shape is not that of the options, the vocabulary is
            another's, or the model is one of characters.
    """
    options = _read_options(_the_only(folder, "options.json", "*options*.json"))
    weights = _the_only(folder, "weights.hdf5", "*weights*.hdf5")
    vocabulary_file = Path(vocab) if vocab else _the_only(folder, "vocab.txt", "*vocab*.txt")
    own = options.get(OWN, {})
    vocabulary = Vocabulary.load(vocabulary_file)
    if own.get("vocabulary_sha256", vocabulary.sha256) != vocabulary.sha256:
        raise CheckpointError(
            f"{vocabulary_file} is not the vocabulary that {folder} was written with (other words, or another order)"
        )
    order = line_order(vocabulary, vocabulary_file)
    stored = options.get("n_tokens_vocab", vocabulary.size)
    if stored != vocabulary.size:
        raise CheckpointError(
            f"{vocabulary_file} has {vocabulary.size:,} words with <S>, </S> and <UNK>, the model in {folder} has "
            f"{stored:,}: give its own vocabulary"
        )
    try:
        require_regular(weights)
        with h5py.File(weights, "r") as file:
            if "char_cnn" in options or "CNN" in file or "char_embed" in file:
                raise _characters(folder)
            sizes = _sizes(options, folder, "mix" if "mix" in file else "top")
            _check_dense(file, sizes, weights)
            softmax = _softmax(file, weights, order)
            table = _mapped(file, "embedding", weights) if "embedding" in file else None
        if table is None:
            other = Path(embedding) if embedding else _the_only(folder, "embedding.hdf5", "*embedding*.hdf5")
            require_regular(other)
            with h5py.File(other, "r") as file:
                table = _mapped(file, "embedding", other)
    except H5_ERRORS as error:
        raise CheckpointError(f"cannot read the weights in {folder}: {error}") from None
    about = {"num_train_tokens": options.get("n_train_tokens"), **own}
    return StoredModel(
        folder, "bilm-tf files", sizes, own.get("boundaries", True), vocabulary, ArrayTable(table, order=order),
        softmax, lambda: _read_dense(sizes, weights), about,
    )


def _the_only(folder: Path, name: str, pattern: str) -> Path:
    if (folder / name).is_file():
        return folder / name
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        what = f"{len(found)} files {pattern}" if found else f"no {name}"
        raise CheckpointError(f"{folder} has {what}: expected one, of a model of word vectors in bilm-tf's files")
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
    version = options.get(OWN, {}).get("version", OWN_VERSION)
    if version > OWN_VERSION:
        raise CheckpointError(
            f"{path} was written by a later lapse-elmo: its additions have version {version}, expected {OWN_VERSION}"
        )
    return options


def _characters(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} is a character-CNN model (ELMo's own kind): lapse-elmo reads models of word vectors only; use "
        "AllenNLP's Elmo for it"
    )


def _sizes(options: dict[str, Any], folder: Path, context: str) -> BiLMOptions:
    lstm = options["lstm"]
    try:
        layers = int(lstm["n_layers"])
        if not options.get("bidirectional", False):
            raise CheckpointError(f"{folder} is a model of one direction: lapse-elmo reads bidirectional ones")
        if layers > 1 and not lstm.get("use_skip_connections", False):
            raise CheckpointError(f"{folder} has no skip connections between its layers: lapse-elmo reads models with")
        return BiLMOptions(
            projection_size=int(lstm["projection_dim"]), cell_size=int(lstm["dim"]), num_layers=layers,
            cell_clip=float(lstm.get("cell_clip") or 0), projection_clip=float(lstm.get("proj_clip") or 0),
            context=context, dropout=0.0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the options of {folder} have no usable {error} below 'lstm'") from None
    except ConfigError as error:
        raise CheckpointError(f"the options of {folder} are wrong: {error}") from None


def line_order(vocabulary: Vocabulary, path: Path) -> np.ndarray | None:
    """Return the line (from 0) of each class of ``vocabulary`` in its file; None where they are the same.

    Raises:
        CheckpointError: If one of the special tokens, which have rows in bilm-tf's files, is missing.
    """
    lines = vocabulary.special_lines()
    if None in lines:
        missing = SPECIAL[lines.index(None)]
        raise CheckpointError(f"{path} has no {missing}, which the vocabulary of a bilm-tf model has: give its own")
    if lines == [0, 1, 2]:
        return None
    others = np.setdiff1d(np.arange(vocabulary.size), np.array(lines, np.int64), assume_unique=True)
    return np.concatenate([np.array(lines, np.int64), others])


def _mapped(file: h5py.File, name: str, path: Path) -> np.ndarray:
    """Return a dataset (V, D), memory-mapped where it is plain float32; else (compressed, other numbers) read whole."""
    dataset = file[name]
    if dataset.ndim != 2:
        raise CheckpointError(f"{path}: {name} has shape {dataset.shape}, expected (words, size)")
    offset = dataset.id.get_offset()
    if offset is not None and dataset.dtype == np.float32:
        return np.memmap(path, np.float32, "r", offset, dataset.shape)
    return np.asarray(dataset[:], np.float32)


def _softmax(file: h5py.File, path: Path, order: np.ndarray | None) -> ArrayTable | None:
    if "softmax/W" not in file:
        return None
    array, bias = _mapped(file, "softmax/W", path), file["softmax/b"][:]
    if bias.shape != array.shape[:1]:
        raise CheckpointError(f"{path}: softmax/b has shape {bias.shape}, expected {array.shape[:1]}")
    return ArrayTable(array, bias, order)


def _groups(sizes: BiLMOptions) -> Iterator[tuple[str, str]]:
    """Our prefix and bilm-tf's group of each layer and direction."""
    for direction, name in enumerate(("forward", "backward")):
        for layer in range(sizes.num_layers):
            yield f"lstm.{name}_layer_{layer}", f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"


def _check_dense(file: h5py.File, sizes: BiLMOptions, path: Path) -> None:
    """Compare the shapes of the LSTM's weights with the options, without reading them."""
    size, cell = sizes.projection_size, sizes.cell_size
    shapes = {"W_0": (2 * size, 4 * cell), "B": (4 * cell,), "W_P_0": (cell, size)}
    for _, group in _groups(sizes):
        if f"{group}/W_0" not in file:
            raise CheckpointError(f"{path} has no {group}/W_0: not bilm-tf's weights of {sizes.num_layers} layers")
        if f"{group}/W_P_0" not in file and size != cell:
            raise CheckpointError(f"{path} has no {group}/W_P_0, which a projection from {cell} to {size} needs")
        for name, shape in shapes.items():
            if f"{group}/{name}" in file and file[f"{group}/{name}"].shape != shape:
                raise CheckpointError(
                    f"{path}: {group}/{name} has shape {file[f'{group}/{name}'].shape}, the options say {shape}"
                )


def _read_dense(sizes: BiLMOptions, path: Path) -> dict[str, np.ndarray]:
    """Return the LSTM's parameters under the names of :class:`~lapse_elmo.model.lstm.FusedElmoLstm`."""
    size, cell = sizes.projection_size, sizes.cell_size
    found: dict[str, np.ndarray] = {}
    try:
        with h5py.File(path, "r") as file:
            for prefix, group in _groups(sizes):
                gates = reordered(np.asarray(file[f"{group}/W_0"][:], np.float32).T)
                bias = reordered(np.array(file[f"{group}/B"][:], np.float32))
                bias[cell : 2 * cell] += 1
                projection = np.eye(size, dtype=np.float32)  # bilm-tf projects only to something smaller
                if f"{group}/W_P_0" in file:
                    projection = np.asarray(file[f"{group}/W_P_0"][:], np.float32).T
                found[f"{prefix}.input_linearity.weight"] = gates[:, :size]
                found[f"{prefix}.state_linearity.weight"] = gates[:, size:]
                found[f"{prefix}.state_linearity.bias"] = bias
                found[f"{prefix}.state_projection.weight"] = projection
            if sizes.context == "mix":
                found |= {f"mix.{name}": file[f"mix/{name}"][:] for name in ("scalars", "gamma")}
    except H5_ERRORS as error:
        raise CheckpointError(f"cannot read the weights in {path}: {error}") from None
    return found


def reordered(gates: np.ndarray) -> np.ndarray:
    """Blocks along the first axis of the gates i, g, f, o (bilm-tf) as i, f, g, o (ours), or the other way round."""
    first, second, third, fourth = np.split(gates, 4)
    return np.concatenate([first, third, second, fourth])
