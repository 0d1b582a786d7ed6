"""A trained model as a torch.nn.Module: word ids or sentences in, contextual vectors out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lapse_elmo.corpus.vocabulary import BEGIN, END, PADDING
from lapse_elmo.trained.sentences import words_of
from lapse_elmo.trained.stored import StoredModel


class ElmoModule(nn.Module):
    """The biLM of a stored model as a layer of a network.

    The LSTM's parameters are this module's; the word table is not: it stays memory-mapped, is never trained and is no
    part of ``state_dict()``. The biLM computes in evaluation mode always (no dropout of its own), also while the
    network around it trains.

    Args:
        stored: An opened model (``lapse_elmo.load(PATH).stored``).
        layers: ``all`` gives (L + 1, B, T, 2D), ``average`` and ``top`` (B, T, 2D).
        requires_grad: Whether the LSTM is trained further.

    Attributes:
        num_layers: L + 1, as AllenNLP's ``Elmo(None, None, n, module=...)`` expects it.

    >>> module = load(MODEL).module(layers="top")
    >>> ids = module.ids(["w01 w02 w00", "w05"])
    >>> ids.shape, module(ids).shape
    (torch.Size([2, 3]), torch.Size([2, 3, 32]))
    """

    def __init__(self, stored: StoredModel, *, layers: str = "all", requires_grad: bool = False) -> None:
        super().__init__()
        if layers not in ("all", "average", "top"):
            raise ValueError(f"layers should be all, average or top, not {layers!r}")
        self.stored, self.layers = stored, layers
        self.bilm = stored.bilm().requires_grad_(requires_grad)
        self.num_layers = stored.options.num_layers + 1
        self.output_dim = 2 * stored.options.projection_size

    def train(self, mode: bool = True) -> ElmoModule:
        """As nn.Module.train, but the biLM stays in evaluation mode."""
        super().train(mode)
        self.bilm.eval()
        return self

    def ids(self, sentences: Sequence[str | Sequence[str]]) -> Tensor:
        """Ids (B, T) int64 of sentences, padded with 0; words as in :meth:`TrainedModel.embed`."""
        encoded = [self.stored.vocabulary.encode(words) for words in words_of(sentences)]
        out = torch.full((len(encoded), max(map(len, encoded), default=0)), PADDING)
        for row, ids in enumerate(encoded):
            out[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return out

    def forward(self, ids: Tensor) -> Tensor:
        """Contextual vectors, zero at padding.

        Args:
            ids: (B, T) int64: 0 padding, which follows the words of a sentence, 3 unknown, then words in the order of
                the vocabulary; without ``<S>`` and ``</S>``, which are added.

        Raises:
            ValueError: For ids out of range, or padding before a word.
        """
        vectors = self._layers(ids)[0]
        if self.stored.boundaries:
            mask = (ids != PADDING).to(vectors.device)
            vectors = vectors[:, :, 1 : ids.shape[1] + 1] * mask[None, :, :, None]
        if self.layers == "all":
            return vectors
        return vectors[-1] if self.layers == "top" else vectors.mean(0)

    def activations(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """All layers with the boundaries: (L + 1, B, T + 2, 2D), and the mask (B, T + 2) bool."""
        return self._layers(ids)

    def _layers(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"ids should be integers (B, T), not {ids.dtype} of shape {tuple(ids.shape)}")
        device = next(self.bilm.parameters()).device
        with_ends = self._bounded(ids.cpu().numpy()) if self.stored.boundaries else ids.cpu().numpy()
        mask = with_ends != PADDING
        if with_ends.size and not 0 <= with_ends.min() <= with_ends.max() <= self.stored.vocabulary.size:
            raise ValueError(f"ids should be from 0 to {self.stored.vocabulary.size}")
        rows, index = np.unique(np.maximum(with_ends, 1) - 1, return_inverse=True)
        table = torch.from_numpy(self.stored.embedding.weights(rows)).to(device)
        embedded = nn.functional.embedding(torch.from_numpy(index.reshape(with_ends.shape)).to(device), table)
        return self.bilm.layers(embedded, torch.from_numpy(mask)), torch.from_numpy(mask).to(ids.device)

    @staticmethod
    def _bounded(ids: np.ndarray) -> np.ndarray:
        """(B, T) as (B, T + 2), with ``<S>`` in front and ``</S>`` behind each sentence."""
        mask = ids != PADDING
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("padding (id 0) must come after the words of a sentence")
        out = np.pad(ids, ((0, 0), (1, 1)), constant_values=PADDING)
        out[:, 0] = BEGIN
        out[np.arange(len(ids)), mask.sum(1) + 1] = END
        return out
