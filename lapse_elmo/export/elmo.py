"""Export a model in bilm-tf's format, which AllenNLP reads too.

``options.json``
    Hyperparameters under bilm-tf's names. The absence of ``char_cnn`` marks a model of word vectors. ``cell_clip`` and
    ``proj_clip`` are null in a model that does not clip. The table
    ``lapse_elmo`` has entries without a counterpart in bilm-tf: whether sentences have boundaries, and the SHA-256 of
    ``vocab.txt``.
``weights.hdf5``
    Float32, for products x @ W. ``embedding`` is (V, D); row i belongs to line i of the vocabulary. For each direction
    d (0 forward, 1 backward) and layer l, the group ``RNN_{d}/RNN/MultiRNNCell/Cell{l}/LSTMCell`` holds ``W_0``
    (2D, 4C), with the rows of the input before those of the recurrent state and the columns of the gates in the order
    i, g, f, o; ``B`` (4C,), in which the forget gate's bias is 1 lower, since readers add 1; and ``W_P_0`` (C, D).
    ``softmax/W`` (V, D) and ``softmax/b`` (V,) are the softmax. A model trained with ``--context mix`` also has
    ``mix/scalars`` (L + 1,) and ``mix/gamma`` (1,), which computing perplexity needs.
``vocab.txt``
    V lines; ``<S>``, ``</S>`` and ``<UNK>`` come first.
``meta.json``
    The fields of the models in the NLPL word embeddings repository; null where only the user knows the value.

If D is not smaller than C, bilm-tf ignores the projection and so computes different vectors; AllenNLP and lapse-elmo do
not. bilm-tf also carries its LSTM's state from one batch to the next, so its vectors change from call to call.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lapse_elmo import __version__
from lapse_elmo.corpus.files import atomic_output, atomic_write, flush_path
from lapse_elmo.corpus.hdf5 import Hdf5Output
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.export.folder import encode_json, refuse_foreign
from lapse_elmo.trained.elmo_files import OWN_VERSION, reordered
from lapse_elmo.trained.stored import OWN, StoredModel, Table

OPTIONS, WEIGHTS, VOCABULARY, META = "options.json", "weights.hdf5", "vocab.txt", "meta.json"


def refuse(folder: Path, overwrite: bool) -> None:
    """Refuse an output directory that must not be replaced.

    Raises:
        OutputError: If it exists without ``overwrite``, or holds files that are not of an export.
    """
    refuse_foreign(folder, overwrite, {OPTIONS, WEIGHTS, VOCABULARY, META})


def write(stored: StoredModel, folder: Path, overwrite: bool) -> list[str]:
    """Write the directory atomically.

    Returns:
        Lines to print for the user.

    Raises:
        OutputError: If the directory cannot be written.
    """
    vocabulary = Vocabulary.from_words(stored.vocabulary.words)
    with atomic_output(folder, overwrite) as temporary:
        temporary.mkdir()
        with Hdf5Output(temporary / WEIGHTS) as file:
            for name, array in dense_arrays(stored):
                file.write(name, array)
            _write_tables(file, stored)
        atomic_write(temporary / OPTIONS, encode_json(bilm_options(stored, vocabulary)))
        atomic_write(temporary / META, encode_json(nlpl_meta(stored)))
        vocabulary.save(temporary / VOCABULARY)
        flush_path(temporary)
    sizes = stored.options
    lines = [f"{folder}: {OPTIONS}, {WEIGHTS}, {VOCABULARY} ({vocabulary.size:,} words) of {stored.path}"]
    if not stored.boundaries:
        lines.append("trained without <S> and </S>: other programs add them to each sentence, so switch that off there")
    if sizes.projection_size >= sizes.cell_size:
        lines.append(
            f"not for bilm-tf itself, which ignores a projection that is not smaller than the cell (D "
            f"{sizes.projection_size}, C {sizes.cell_size}), so its vectors differ: use AllenNLP or lapse_elmo.load"
        )
    return lines


def _write_tables(file: Hdf5Output, stored: StoredModel) -> None:
    size, rows = stored.options.projection_size, stored.vocabulary.size
    file.write_rows("embedding", (rows, size), stored.embedding.chunks())
    if stored.softmax is None:
        return
    bias = np.empty(rows, np.float32)

    def weights(table: Table = stored.softmax) -> Iterator[tuple[int, np.ndarray]]:
        for first, chunk in table.chunks():
            bias[first : first + len(chunk)] = chunk[:, size]
            yield first, chunk[:, :size]

    file.write_rows("softmax/W", (rows, size), weights())
    file.write("softmax/b", bias)


def bilm_options(stored: StoredModel, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the content of options.json, without training options if they are unknown."""
    sizes, config = stored.options, stored.about.get("config") or {}
    options: dict[str, Any] = {
        "bidirectional": True,
        "lstm": {
            "dim": sizes.cell_size, "projection_dim": sizes.projection_size, "n_layers": sizes.num_layers,
            # TensorFlow's cell clips to the interval [-0, 0] if it is given 0, and not at all if it is given null.
            "cell_clip": sizes.cell_clip or None, "proj_clip": sizes.projection_clip or None,
            "use_skip_connections": True,
        },
        "n_tokens_vocab": vocabulary.size, "n_train_tokens": stored.about.get("num_train_tokens") or 0,
        OWN: {
            "version": OWN_VERSION, "boundaries": stored.boundaries, "vocabulary_sha256": vocabulary.sha256,
            "written_by": __version__, "step": stored.about.get("step"),
        },
    }
    if config:
        options |= {
            "dropout": config["model"]["dropout"], "all_clip_norm_val": config["optimizer"]["clip_norm"],
            "batch_size": config["training"]["batch_size"], "n_epochs": config["training"]["epochs"],
            "unroll_steps": config["data"]["max_length"] + 2 * stored.boundaries,
            "n_negative_samples_batch": config["softmax"]["num_samples"],
        }
    return options


def nlpl_meta(stored: StoredModel) -> dict[str, Any]:
    """Return ``meta.json`` with all fields that the NLPL repository's models have; null where only the user knows.

    The fields are those of http://wiki.nlpl.eu/Vectors/metadata, which also says what each is. NLPL assigns ``id`` and
    ``handle``.
    """
    config, versions = stored.about.get("config") or {}, stored.about.get("versions") or {}
    unknown = ("NER", "case preserved", "id", "language", "lemmatized", "public", "stop words removal", "tagger",
               "tagset", "tool", "url")
    return {
        "algorithm": {
            "command": None, "id": None, "name": "Embeddings from Language Models (ELMo), word vectors in place of the "
            "character CNN", "tool": "lapse-elmo", "url": None, "version": versions.get("lapse_elmo", __version__),
        },
        "contents": [
            {"filename": WEIGHTS, "format": "hdf5"}, {"filename": OPTIONS, "format": "json"},
            {"filename": VOCABULARY, "format": "text"}, {"filename": META, "format": "json"},
        ],
        "corpus": [{
            **dict.fromkeys(unknown), "description": config.get("data", {}).get("shards"),
            "tokens": stored.about.get("num_train_tokens"),
        }],
        "creators": [], "dimensions": 2 * stored.options.projection_size, "documentation": [], "handle": None,
        "id": None, "iterations": config.get("training", {}).get("epochs"), "vocabulary size": stored.vocabulary.size,
        "window": None,
    }


def dense_arrays(stored: StoredModel) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names and arrays of all parameters except for the tables."""
    for direction, name in enumerate(("forward", "backward")):
        for layer in range(stored.options.num_layers):
            weights = {
                what: stored.dense[f"lstm.{name}_layer_{layer}.{what}"]
                for what in ("input_linearity.weight", "state_linearity.weight", "state_linearity.bias",
                             "state_projection.weight")
            }
            both = np.concatenate([weights["input_linearity.weight"], weights["state_linearity.weight"]], 1)
            bias = weights["state_linearity.bias"].copy()
            size = len(bias) // 4
            bias[size : 2 * size] -= 1  # of the forget gate: readers add 1, as TensorFlow's cell does
            group = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            yield f"{group}/W_0", np.ascontiguousarray(reordered(both).T)
            yield f"{group}/B", reordered(bias)
            yield f"{group}/W_P_0", np.ascontiguousarray(weights["state_projection.weight"].T)
    if stored.options.context == "mix":
        yield "mix/scalars", stored.dense["mix.scalars"]
        yield "mix/gamma", stored.dense["mix.gamma"]
