"""Read models from the Hugging Face directories that ``bin/export --format huggingface`` writes.

The words are read from ``vocab.txt``: a model of 793,471 words opens in a third of the time that ``tokenizer.json``
takes. A directory without it, as an older lapse-elmo writes, is read from ``tokenizer.json``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.errors import CheckpointError, ConfigError
from lapse_elmo.inputs import MOST_JSON_BYTES, read_small, require_regular
from lapse_elmo.model.bilm import BiLMOptions
from lapse_elmo.trained.stored import ArrayTable, StoredModel, own_entries

MODEL_TYPE = "lapse_elmo"
CONFIG, WEIGHTS, TOKENIZER, VOCABULARY = "config.json", "model.safetensors", "tokenizer.json", "vocab.txt"
#: The version of the format, in the table of ``config.json`` with lapse-elmo's own entries.
OWN_VERSION = 1


def holds_huggingface_files(folder: Path) -> bool:
    """Return whether ``folder`` looks like a Hugging Face model of any type."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def open_huggingface_files(folder: Path, vocab: str | os.PathLike[str] = "") -> StoredModel:
    """Open the model in ``folder``, with memory-mapped tables.

    Args:
        folder: The directory.
        vocab: A vocabulary file, which must have the same words; the model has its own.

    Raises:
        CheckpointError: If the model is of another type or of a newer format, a file is missing or damaged, or the
            vocabulary is another one.
    """
    config = _read_json(folder / CONFIG)
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{folder} is a Hugging Face model of type {config.get('model_type')!r}: lapse-elmo reads {MODEL_TYPE!r}"
        )
    own = own_entries(config, OWN_VERSION, folder / CONFIG)
    tensors = _tensors(folder / WEIGHTS)
    vocabulary = _vocabulary(folder, own.get("vocabulary_sha256"))
    if vocab and Vocabulary.load(vocab).words != vocabulary.words:
        raise CheckpointError(f"{vocab} is not the vocabulary of {folder} (different words or order): leave it out")
    names = ("projection_size", "cell_size", "num_layers", "cell_clip", "projection_clip", "context")
    try:
        options = BiLMOptions(**{name: config[name] for name in names}, dropout=0.0)
        embedding = ArrayTable(tensors.pop("embedding.weight")[1:])  # row 0 is padding
        softmax = ArrayTable(tensors.pop("softmax.weight")[1:], tensors.pop("softmax.bias")[1:])
    except (KeyError, TypeError, ConfigError, ValueError, IndexError) as error:
        raise CheckpointError(f"{folder} is damaged: {CONFIG} or {WEIGHTS} has no usable {error}") from None
    return StoredModel(
        folder, "Hugging Face directory", options, bool(config.get("boundaries", True)), vocabulary, embedding, softmax,
        lambda: tensors, {"num_train_tokens": config.get("num_train_tokens"), **own},
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_small(path, MOST_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def _tensors(path: Path) -> dict[str, np.ndarray]:
    """Return all tensors by name in float32, memory-mapped if they are stored so.

    transformers may have saved them in bfloat16, which NumPy lacks. safetensors rejects a file whose header contradicts
    its size.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise CheckpointError("reading a Hugging Face directory needs safetensors: pip install safetensors") from None
    try:
        require_regular(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; it is damaged or cut short") from None


def _vocabulary(folder: Path, sha256: str | None) -> Vocabulary:
    """Return the vocabulary; ``sha256`` is the checksum of ``vocab.txt``, None if it was written without one."""
    if sha256 is None or not (folder / VOCABULARY).is_file():
        return Vocabulary.from_words(_words(folder / TOKENIZER))
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    if vocabulary.sha256 != sha256:
        raise CheckpointError(
            f"{folder / VOCABULARY} is not the vocabulary that {folder} was written with (different words or order): "
            f"restore it, or delete it to read {TOKENIZER}"
        )
    return vocabulary


def _words(path: Path) -> list[str]:
    """Return the words in the order of their ids, without padding and the special tokens."""
    try:
        ids: dict[str, int] = _read_json(path)["model"]["vocab"]
        words = sorted(ids, key=ids.__getitem__)
        if [ids[word] for word in words] != list(range(len(words))):
            raise ValueError("ids with gaps")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no word-level vocabulary: {error}") from None
    return words[4:]
