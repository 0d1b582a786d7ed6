"""A trained model in AllenNLP 2: a token indexer and a token embedder, both of type ``lapse-elmo``.

AllenNLP finds them with ``--include-package lapse_elmo.allennlp_plugin``, or in a program by importing this module. In
a configuration:

.. code-block:: json

    {"dataset_reader": {"type": "sequence_tagging",
                        "token_indexers": {"elmo": {"type": "lapse-elmo", "model": "runs/first"}}},
     "model": {"type": "simple_tagger",
               "text_field_embedder": {"token_embedders": {
                   "elmo": {"type": "lapse-elmo", "model": "runs/first", "dropout": 0.5}}}}}

Without a registry: ``Elmo(None, None, n, module=AllenNlpModule(lapse_elmo.load(PATH)))`` takes the ids that
``LapseElmoIndexer`` makes.
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
    """Ids of words in the model's own vocabulary; AllenNLP's vocabulary has no part in it.

    :param model: where the model is, as :func:`lapse_elmo.load` takes it.
    :param vocabulary_file: its vocabulary, where that does not lie with it.
    """

    def __init__(self, model: str, vocabulary_file: str = "", token_min_padding_length: int = 0) -> None:
        super().__init__(token_min_padding_length)
        self._vocabulary = load(model, vocab=vocabulary_file).vocabulary

    def count_vocab_items(self, token: Token, counter: dict[str, dict[str, int]]) -> None:
        """Nothing to count."""

    def get_empty_token_list(self) -> IndexedTokenList:
        return {_KEY: []}

    def tokens_to_indices(self, tokens: list[Token], vocabulary: Vocabulary) -> IndexedTokenList:
        return {_KEY: self._vocabulary.encode(token.ensure_text() for token in tokens)}

    def as_padded_tensor_dict(self, tokens: IndexedTokenList, padding_lengths: dict[str, int]) -> dict[str, Tensor]:
        ids = pad_sequence_to_length(tokens[_KEY], padding_lengths[_KEY], default_value=lambda: PADDING)
        return {_KEY: torch.tensor(ids, dtype=torch.int64)}


class AllenNlpModule(nn.Module):
    """What AllenNLP's ``Elmo(None, None, n, module=...)`` expects of a biLM.

    :param model: an opened model with boundaries; ``Elmo`` takes two positions of each sentence away.
    :param requires_grad: whether the LSTM is trained further.
    :raises ValueError: for a model that was trained without boundaries.
    """

    def __init__(self, model: TrainedModel, requires_grad: bool = False) -> None:
        super().__init__()
        if not model.stored.boundaries:
            raise ValueError(f"{model.stored.path} was trained without <S> and </S>, which AllenNLP's Elmo takes away")
        self.elmo = ElmoModule(model.stored, requires_grad=requires_grad)
        self.num_layers = self.elmo.num_layers

    def get_output_dim(self) -> int:
        """2D."""
        return self.elmo.output_dim

    def forward(self, inputs: Tensor, word_inputs: Tensor | None = None) -> dict[str, Any]:
        """:param inputs: ids (B, T), padded with 0. :param word_inputs: not used."""
        layers, mask = self.elmo.activations(inputs)
        return {"activations": list(layers), "mask": mask}


@TokenEmbedder.register("lapse-elmo")
class LapseElmoEmbedder(TokenEmbedder):
    """A trainable scalar mix of all layers, with dropout.

    :param model: where the model is, as :func:`lapse_elmo.load` takes it. A saved AllenNLP model does not contain the
        word table, so it is needed there too.
    :param vocabulary_file: its vocabulary, where that does not lie with it.
    :param dropout: on the mixed vectors.
    :param requires_grad: whether the LSTM is trained further; the word table never is.
    :param do_layer_norm: of each layer before it is mixed.
    :param scalar_mix_parameters: fixed weights of the mix, before the softmax; trained from 0 if None.
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
        no_file: Any = None  # which AllenNLP wants here, though it annotates a string
        self._elmo = Elmo(
            no_file, no_file, 1, dropout=dropout, do_layer_norm=do_layer_norm, scalar_mix_parameters=fixed, module=bilm
        )

    def get_output_dim(self) -> int:
        return self._elmo.get_output_dim()

    def forward(self, lapse_elmo_ids: Tensor) -> Tensor:
        """(B, T) ids to (B, T, 2D)."""
        return self._elmo(lapse_elmo_ids)["elmo_representations"][0]
