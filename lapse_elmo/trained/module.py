"""A trained model as a torch.nn.Module that maps word ids to contextual vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lapse_elmo.corpus.vocabulary import BEGIN, END, PADDING
from lapse_elmo.model.bilm import ScalarMix
from lapse_elmo.model.packing import Packing
from lapse_elmo.trained.sentences import words_of
from lapse_elmo.trained.stored import StoredModel


class ElmoModule(nn.Module):
    """The biLM of a stored model as a layer of a larger network.

    The LSTM's parameters are parameters of this module. The word table is not: it stays memory-mapped, is never trained
    and is not part of ``state_dict()``. The biLM stays in evaluation mode (without dropout) even while the network
    trains.

    Args:
        stored: An opened model (``lapse_elmo.load(PATH).stored``).
        layers: Output layers: ``all`` returns (L + 1, B, T, 2D); ``average``, ``top`` and ``mix`` return (B, T, 2D).
            ``mix`` is ELMo's weighted sum of the layers, whose weights the network learns (:attr:`mix`).
        requires_grad: Whether to fine-tune the LSTM.
        precision: Precision of the LSTM's matrix products, ``fp32`` or ``bf16``; ``torch.autocast`` changes nothing.

    Raises:
        ValueError: If ``layers`` is unknown.
        CheckpointError: If a parameter of the biLM is missing or has another shape.

    Attributes:
        num_layers: L + 1, the number that AllenNLP's ``Elmo(None, None, n, module=...)`` expects.
        output_dim: 2D.
        mix: The weights of ``layers="mix"``, at first those of the average; None for other ``layers``.

    >>> module = load(MODEL).module(layers="top")
    >>> ids = module.ids(["w01 w02 w00", "w05"])
    >>> ids.shape, module(ids).shape
    (torch.Size([2, 3]), torch.Size([2, 3, 32]))
    >>> [name for name, p in load(MODEL).module(layers="mix").named_parameters() if p.requires_grad]
    ['mix.scalars', 'mix.gamma']
    """

    def __init__(
        self, stored: StoredModel, *, layers: str = "all", requires_grad: bool = False, precision: str = "fp32"
    ) -> None:
        super().__init__()
        if layers not in ("all", "average", "top", "mix"):
            raise ValueError(f"layers should be all, average, top or mix, not {layers!r}")
        self.stored, self.layers = stored, layers
        self.bilm = stored.bilm(precision).requires_grad_(requires_grad)
        if self.bilm.mix is not None:  # no output depends on it, which DistributedDataParallel would take for a fault
            self.bilm.mix.requires_grad_(False)
        self.num_layers = stored.options.num_layers + 1
        self.output_dim = 2 * stored.options.projection_size
        self.mix = ScalarMix(self.num_layers) if layers == "mix" else None

    def train(self, mode: bool = True) -> ElmoModule:
        """Set the mode of this module; the biLM stays in evaluation mode.

        >>> load(MODEL).module().train().bilm.training
        False
        """
        super().train(mode)
        self.bilm.eval()
        return self

    def ids(self, sentences: Sequence[str | Sequence[str]]) -> Tensor:
        """Return the ids of sentences, for :meth:`forward`.

        Args:
            sentences: B strings, which are split at white space, or lists of words.

        Returns:
            (B, T) int64 for sentences of at most T words: 3 for an unknown word, 0 after the end of a sentence.

        Raises:
            TypeError: If ``sentences`` is a single string, or a sentence is not text.

        >>> layer = load(MODEL).module()
        >>> layer.ids(["w00 unheard-of", ["w00"]]).tolist() == [[layer.stored.vocabulary.encode(["w00"])[0], 3], [4, 0]]
        True
        """
        encoded = [self.stored.vocabulary.encode(words) for words in words_of(sentences)]
        out = torch.full((len(encoded), max(map(len, encoded), default=0)), PADDING)
        for row, ids in enumerate(encoded):
            out[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return out

    def forward(self, ids: Tensor) -> Tensor:
        """Return the contextual vectors, zero at padding; the constructor's ``layers`` determines the shape.

        Args:
            ids: (B, T) int64 without ``<S>`` and ``</S>``, which are added here. 0 is padding (after the words of a
                sentence), 3 is ``<UNK>``, and words in the order of the vocabulary follow.

        Returns:
            Float32, (L + 1, B, T, 2D) for ``all``, else (B, T, 2D), on the device of the LSTM.

        Raises:
            ValueError: If the ids are not integers (B, T), one is out of range, or padding precedes a word.

        >>> layer = load(MODEL).module()
        >>> vectors = layer(layer.ids(["w01 w02 w00", "w05"]))
        >>> vectors.shape, bool(vectors[:, 1, 1:].any())
        (torch.Size([3, 2, 3, 32]), False)
        """
        vectors = self.activations(ids)[0]
        if self.stored.boundaries:
            mask = (ids != PADDING).to(vectors.device)
            vectors = vectors[:, :, 1 : ids.shape[1] + 1] * mask[None, :, :, None]
        if self.layers == "all":
            return vectors
        if self.mix is not None:
            return self.mix(vectors.unbind())
        return vectors[-1] if self.layers == "top" else vectors.mean(0)

    def activations(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return all layers including boundary tokens (L + 1, B, T + 2, 2D), and the mask (B, T + 2) bool.

        For AllenNLP's ``Elmo``, which removes the boundaries itself. A model trained without them has T positions.

        Raises:
            ValueError: As :meth:`forward`.

        >>> layer = load(MODEL).module()
        >>> vectors, mask = layer.activations(layer.ids(["w01 w02 w00", "w05"]))
        >>> vectors.shape, mask.sum(1).tolist()
        (torch.Size([3, 2, 5, 32]), [5, 3])
        """
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"ids should be integers (B, T), not {ids.dtype} of shape {tuple(ids.shape)}")
        # Not parameters(): a replica of DataParallel has none.
        device = self.bilm.lstm.cell(0, 0).state_linearity.weight.device  # type: ignore[operator]
        bounded = self._add_boundaries(ids.cpu().numpy()) if self.stored.boundaries else ids.cpu().numpy()
        mask = bounded != PADDING
        if bounded.size and not 0 <= bounded.min() <= bounded.max() <= self.stored.vocabulary.size:
            raise ValueError(f"ids should be from 0 to {self.stored.vocabulary.size}")
        packing = Packing.of_mask(torch.from_numpy(mask))
        rows, index = np.unique(bounded.reshape(-1)[packing.tokens.numpy()] - 1, return_inverse=True)
        table = torch.from_numpy(self.stored.embedding.weights(rows)).to(device)
        tokens = nn.functional.embedding(torch.from_numpy(index).to(device), table)
        return self.bilm.layers(tokens, packing.to(device)), torch.from_numpy(mask).to(ids.device)

    @staticmethod
    def _add_boundaries(ids: np.ndarray) -> np.ndarray:
        """Return ids (B, T) as (B, T + 2), with ``<S>`` before and ``</S>`` after each sentence."""
        mask = ids != PADDING
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("padding (id 0) must come after the words of a sentence")
        out = np.pad(ids, ((0, 0), (1, 1)), constant_values=PADDING)
        out[:, 0] = BEGIN
        out[np.arange(len(ids)), mask.sum(1) + 1] = END
        return out
