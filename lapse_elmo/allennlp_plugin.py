"""A trained model in AllenNLP 2: a token indexer and a token embedder, both of type ``lapse-elmo``.

They are registered by ``--include-package lapse_elmo.allennlp_plugin``, or in a program by importing this module. In
a configuration:

.. code-block:: json

    {"dataset_reader": {"type": "sequence_tagging",
                        "token_indexers": {"elmo": {"type": "lapse-elmo", "model": "runs/first"}}},
     "model": {"type": "simple_tagger",
               "text_field_embedder": {"token_embedders": {
                   "elmo": {"type": "lapse-elmo", "model": "runs/first", "dropout": 0.5}}}}}

Without the registry: ``Elmo(None, None, n, module=AllenNlpModule(lapse_elmo.load(PATH)))`` takes the ids that
``LapseElmoIndexer`` returns.
"""

from __future__ import annotations

from typing import Any

import torch
from allennlp.common.util import pad_sequence_to_length
from allennlp.data.token_indexers.token_indexer import IndexedTokenList, TokenIndexer
from allennlp.data.tokenizers import Token
from allennlp.data.vocabulary import Vocabulary
from allennlp.modules.elmo import Elmo
from allennlp.modules.token_embedders.token_embedder import TokenEmbedder
from torch import Tensor, nn

from lapse_elmo.corpus.vocabulary import PADDING
from lapse_elmo.trained import TrainedModel, load
from lapse_elmo.trained.module import ElmoModule

_KEY = "lapse_elmo_ids"


@TokenIndexer.register("lapse-elmo")
class LapseElmoIndexer(TokenIndexer):
    """Indexes words by the model's own vocabulary; AllenNLP's vocabulary is not used.

    Args:
        model: Path of the model, as for :func:`lapse_elmo.load`.
        vocabulary_file: Its vocabulary, if that is not stored with it.
        token_min_padding_length: As for AllenNLP's ``TokenIndexer``.
    """

    def __init__(self, model: str, vocabulary_file: str = "", token_min_padding_length: int = 0) -> None:
        super().__init__(token_min_padding_length)
        self._vocabulary = load(model, vocab=vocabulary_file).vocabulary

    def count_vocab_items(self, token: Token, counter: dict[str, dict[str, int]]) -> None:
        """Do nothing: the vocabulary is the model's."""

    def get_empty_token_list(self) -> IndexedTokenList:
        """Return the index of no tokens."""
        return {_KEY: []}

    def tokens_to_indices(self, tokens: list[Token], vocabulary: Vocabulary) -> IndexedTokenList:
        """Return the ids of ``tokens``; ``vocabulary`` is not used."""
        return {_KEY: self._vocabulary.encode(token.ensure_text() for token in tokens)}

    def as_padded_tensor_dict(self, tokens: IndexedTokenList, padding_lengths: dict[str, int]) -> dict[str, Tensor]:
        """Return the ids as a tensor, padded with 0."""
        ids = pad_sequence_to_length(tokens[_KEY], padding_lengths[_KEY], default_value=lambda: PADDING)
        return {_KEY: torch.tensor(ids, dtype=torch.int64)}


class AllenNlpModule(nn.Module):
    """The biLM that AllenNLP's ``Elmo(None, None, n, module=...)`` takes.

    Args:
        model: An opened model.
        requires_grad: Whether the LSTM is trained further.

    Raises:
        ValueError: For a model that was trained without boundaries: ``Elmo`` removes the first and the last position
            of each sentence.
    """

    def __init__(self, model: TrainedModel, requires_grad: bool = False) -> None:
        super().__init__()
        if not model.stored.boundaries:
            raise ValueError(f"{model.stored.path} was trained without <S> and </S>, which AllenNLP's Elmo expects")
        self.elmo = ElmoModule(model.stored, requires_grad=requires_grad, precision=model.precision)
        self.num_layers = self.elmo.num_layers

    def get_output_dim(self) -> int:
        """Return 2D, the size of a vector."""
        return self.elmo.output_dim

    def forward(self, inputs: Tensor, word_inputs: Tensor | None = None) -> dict[str, Any]:
        """Return all layers (each (B, T, 2D)) and the mask (B, T) of the ids ``inputs`` (B, T), padded with 0.

        ``word_inputs`` is not used.
        """
        layers, mask = self.elmo.activations(inputs)
        return {"activations": list(layers), "mask": mask}


@TokenEmbedder.register("lapse-elmo")
class LapseElmoEmbedder(TokenEmbedder):
    """A trainable scalar mix of all layers, with dropout.

    Args:
        model: Path of the model, as for :func:`lapse_elmo.load`. A saved AllenNLP model does not contain the word
            table, so the model is also needed to load that.
        vocabulary_file: Its vocabulary, if that is not stored with it.
        dropout: Dropout of the mixed vectors.
        requires_grad: Whether the LSTM is trained further; the word table never is.
        do_layer_norm: Whether each layer is normalised before it is mixed.
        scalar_mix_parameters: Fixed weights of the mix, before the softmax; None for weights trained from 0.
    """

    def __init__(
        self,
        model: str,
        vocabulary_file: str = "",
        dropout: float = 0.5,
        requires_grad: bool = False,
        do_layer_norm: bool = False,
        scalar_mix_parameters: list[float] | None = None,
    ) -> None:
        super().__init__()
        bilm: Any = AllenNlpModule(load(model, vocab=vocabulary_file), requires_grad)
        fixed: Any = scalar_mix_parameters
        no_file: Any = None  # AllenNLP takes None here, although the annotation says str
        self._elmo = Elmo(
            no_file, no_file, 1, dropout=dropout, do_layer_norm=do_layer_norm, scalar_mix_parameters=fixed, module=bilm
        )

    def get_output_dim(self) -> int:
        """Return 2D, the size of a vector."""
        return self._elmo.get_output_dim()

    def forward(self, lapse_elmo_ids: Tensor) -> Tensor:
        """Return the mixed vectors (B, T, 2D) of ids (B, T)."""
        return self._elmo(lapse_elmo_ids)["elmo_representations"][0]
