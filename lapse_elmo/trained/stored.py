"""The common representation of opened models of all kinds: options, vocabulary, tables and LSTM parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch

from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.errors import CheckpointError
from lapse_elmo.model.bilm import BiLM, BiLMOptions

#: The table of ``options.json`` or ``config.json`` with lapse-elmo's own entries, for which the formats have none.
OWN = "lapse_elmo"

_CHUNK_ROWS = 16384  # rows in memory at a time


class Table(Protocol):
    """A table of ``num_rows`` rows of ``size`` float32 weights; row i belongs to class i, the word with id i + 1."""

    num_rows: int
    size: int

    def weights(self, numbers: np.ndarray) -> np.ndarray:
        """Return the rows ``numbers`` (n,) int64 as a new array (n, size)."""

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield all rows in ascending chunks: (index of the first row, rows (n, size))."""


def own_entries(content: dict[str, Any], newest: int, path: Path) -> dict[str, Any]:
    """Return the table of lapse-elmo's own entries in a file's content; empty if there is none.

    Args:
        content: What the file holds.
        newest: The newest version of the format that is supported.
        path: The file, for error messages.

    Raises:
        CheckpointError: If the format is newer, or the table is damaged.
    """
    own = content.get(OWN, {})
    version = own.get("version", newest) if isinstance(own, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"{path} is damaged: its table {OWN!r} has no version; export the model again")
    if version > newest:
        raise CheckpointError(
            f"{path} was written by a newer lapse-elmo: its format has version {version}, the newest supported version "
            f"is {newest}; update lapse-elmo"
        )
    return own


def mapped(dataset: h5py.Dataset, content: np.ndarray) -> np.ndarray:
    """Return a dataset as a view of its file if it is uncompressed float32; otherwise read it into memory.

    Args:
        dataset: The dataset.
        content: The bytes of its file (uint8), memory-mapped. They stay if the file is removed, or replaced by another
            of its name. One map per file, since each map keeps a file descriptor.
    """
    offset = dataset.id.get_offset()
    if offset is not None and dataset.dtype == np.float32:
        return content[offset : offset + dataset.nbytes].view(np.float32).reshape(dataset.shape)
    return np.asarray(dataset[()], np.float32)


class ArrayTable:
    """A table backed by an array, which may be memory-mapped.

    Args:
        array: (V, D).
        bias: (V,), appended as the last column if given.
        order: (V,) row of the array for each class; None if they are the same.
    """

    def __init__(self, array: np.ndarray, bias: np.ndarray | None = None, order: np.ndarray | None = None) -> None:
        self._array, self._bias, self._order = array, bias, order
        self.num_rows, size = array.shape
        self.size = size + (bias is not None)

    def weights(self, numbers: np.ndarray) -> np.ndarray:
        indices = numbers if self._order is None else self._order[numbers]
        rows = np.asarray(self._array[indices], np.float32)
        if self._bias is None:
            return np.ascontiguousarray(rows)
        return np.concatenate([rows, np.asarray(self._bias[indices], np.float32)[:, None]], 1)

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        for first in range(0, self.num_rows, _CHUNK_ROWS):
            yield first, self.weights(np.arange(first, min(first + _CHUNK_ROWS, self.num_rows)))


@dataclass(frozen=True)
class StoredModel:
    """An opened model; rows of its tables are read from disk only when they are needed.

    Pickled, it is the path of its files, which are opened again; a deep copy is the model itself.

    Attributes:
        path: The model's directory.
        kind: ``checkpoint``, ``bilm-tf files`` or ``Hugging Face directory``.
        options: The model's hyperparameters.
        boundaries: Whether it was trained with ``<S>`` and ``</S>`` around each sentence.
        vocabulary: The model's vocabulary of V classes.
        embedding: (V, D).
        softmax: (V, D + 1), the bias in the last column; None if the files have no softmax.
        read_dense: Function that reads :attr:`dense` at first use, so that opening a large model is fast. It reads what
            was there when the model was opened, as the tables do.
        about: Metadata, if known: ``step``, ``num_train_tokens`` (of the corpus), ``num_trained_tokens`` (in all
            epochs), ``results``, ``versions``, ``config``.

    >>> stored = load(MODEL).stored
    >>> stored.kind, stored.options.projection_size, stored.embedding.num_rows == stored.vocabulary.size
    ('checkpoint', 16, True)
    """

    path: Path
    kind: str
    options: BiLMOptions
    boundaries: bool
    vocabulary: Vocabulary
    embedding: Table
    softmax: Table | None
    read_dense: Callable[[], dict[str, np.ndarray]]
    about: dict[str, Any] = field(default_factory=dict)
    #: Where it can be opened again: a function and its arguments. Not copied by ``dataclasses.replace``.
    reopen: tuple[Callable[..., StoredModel], tuple[Any, ...]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        size, rows = self.options.projection_size, self.vocabulary.size
        for name, table, width in (("embedding", self.embedding, size), ("softmax", self.softmax, size + 1)):
            if table is not None and (table.num_rows, table.size) != (rows, width):
                raise CheckpointError(
                    f"{self.path}: the {name} has {table.num_rows:,} rows of {table.size}, expected {rows:,} (the "
                    f"vocabulary's words and <S>, </S>, <UNK>) of {width}; its files do not belong together"
                )

    def __reduce__(self) -> tuple[Callable[..., StoredModel], tuple[Any, ...]]:
        if self.reopen is None:
            raise TypeError(f"cannot pickle the model of {self.path}: it was not opened by lapse_elmo.load")
        return self.reopen

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredModel:
        return self  # nothing changes it, and a copy would hold the tables in memory

    @functools.cached_property
    def dense(self) -> dict[str, np.ndarray]:
        """The parameters of the biLM by their names in :class:`~lapse_elmo.model.bilm.BiLM`."""
        return self.read_dense()

    def bilm(self, precision: str = "fp32") -> BiLM:
        """Return the biLM with the stored parameters, in evaluation mode.

        Args:
            precision: Precision of its matrix products in evaluation mode, ``fp32`` or ``bf16``.

        Raises:
            CheckpointError: If a parameter is missing or has another shape.

        >>> load(MODEL).stored.bilm().training
        False
        """
        model = BiLM(self.options, None)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                stored = self.dense.get(name)
                if stored is None:
                    raise CheckpointError(f"{self.path} has no parameter {name}: it is damaged or another model's")
                if stored.shape != tuple(parameter.shape):
                    raise CheckpointError(
                        f"{self.path}: parameter {name} has shape {stored.shape}, expected {tuple(parameter.shape)} "
                        "by the model's sizes"
                    )
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(stored, np.float32)))
        model.lstm.eval_precision = precision  # type: ignore[assignment]
        return model.eval()
