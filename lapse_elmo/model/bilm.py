"""The bidirectional language model (biLM) of ELMo: maps word embeddings to the context vectors that predict words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lapse_elmo.errors import ConfigError
from lapse_elmo.model import reference
from lapse_elmo.model.initial_values import LSTM_INITS, initialize_lstm
from lapse_elmo.model.lstm import FusedElmoLstm
from lapse_elmo.model.packing import Packing
from lapse_elmo.model.products import PRECISIONS


@dataclass(frozen=True)
class BiLMOptions:
    """Hyperparameters of the biLM.

    Attributes:
        projection_size: D, the size of the embeddings and of the hidden states.
        cell_size: C, the size of the LSTM's cells.
        num_layers: L, per direction.
        dropout: Dropout probability for the LSTM's input and for the context vectors.
        recurrent_dropout: Dropout probability for the recurrent hidden state; each sentence has one mask for all steps.
        cell_clip: Largest magnitude of a cell; 0 disables clipping.
        projection_clip: Largest magnitude of a hidden state; 0 disables clipping.
        context: What predicts a word: the ``top`` layer, as in ELMo, or a learned scalar ``mix`` of all layers.
        lstm: The implementation, ``fused`` or ``allennlp``; both give the same results.
        precision: Precision of the fused LSTM's matrix products in training, ``fp32`` or ``bf16``.
        lstm_init: Initialization scheme (:mod:`lapse_elmo.model.initial_values`).
        stateful: Whether the LSTM's state carries over from one batch to the next.

    Raises:
        ConfigError: If a value is out of range.
    """

    projection_size: int = 128
    cell_size: int = 512
    num_layers: int = 2
    dropout: float = 0.1
    recurrent_dropout: float = 0.0
    cell_clip: float = 3.0
    projection_clip: float = 3.0
    context: str = "top"
    lstm: str = "fused"
    precision: str = "fp32"
    lstm_init: str = "glorot"
    stateful: bool = False

    def __post_init__(self) -> None:
        for name in ("projection_size", "cell_size", "num_layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("dropout", "recurrent_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be at least 0 and below 1")
        for name in ("cell_clip", "projection_clip"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be positive, or 0 for no clipping")
        choices_of = {"context": ("top", "mix"), "lstm": ("fused", "allennlp"), "lstm_init": LSTM_INITS,
                      "precision": PRECISIONS}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, it must be one of {', '.join(choices)}")


class ScalarMix(nn.Module):
    """Learned weighted sum of tensors: gamma * sum_k s_k * tensor_k with s = softmax(scalars).

    Equivalent to AllenNLP's ScalarMix without layer norm. The parameters are ``scalars`` (mixture_size,), initially 0,
    and ``gamma`` (1,), initially 1.
    """

    def __init__(self, mixture_size: int) -> None:
        super().__init__()
        self.scalars = nn.Parameter(torch.zeros(mixture_size))
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum of ``mixture_size`` tensors of the same shape."""
        weights = torch.softmax(self.scalars, 0) * self.gamma
        mixed = tensors[0] * weights[0]
        for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
            mixed = torch.addcmul(mixed, tensor, weight)
        return mixed


class BiLM(nn.Module):
    """Stacked forward and backward LSTMs that compute the context vectors of embedded sentences.

    Args:
        options: Hyperparameters.
        generator: Source of the initial values; generators in the same state give the same model on every rank. None
            leaves the LSTM's weights zero, for a caller that copies stored weights into them.
    """

    def __init__(self, options: BiLMOptions, generator: torch.Generator | None) -> None:
        super().__init__()
        self.options = options
        self.lstm = _build_lstm(options)
        if generator is not None:
            initialize_lstm(self.lstm, options.lstm_init, generator)
        self.mix = ScalarMix(options.num_layers + 1) if options.context == "mix" else None

    def train(self, mode: bool = True) -> BiLM:
        """Set the mode as ``nn.Module.train`` does, and reset the carried state if the mode changes."""
        if mode != self.training:
            self.reset_states()
        super().train(mode)
        return self

    def reset_states(self) -> None:
        """Start the next batch from zero state; only a stateful model needs this."""
        self.lstm.reset_states()  # type: ignore[operator]

    def forward(
        self, tokens: Tensor, packing: Packing, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the context vectors of both directions.

        The forward vector at position t has read tokens 0 to t and predicts token t + 1. The backward vector at t has
        read the sentence from its end down to t and predicts token t - 1.

        Args:
            tokens: (N, D) word embeddings, packed, float32 or float64.
            packing: Their layout, on the same device.
            generator: Source of all dropout masks in training mode; None means torch's global generator.

        Returns:
            The forward and the backward context vectors, each (N, D) and packed.
        """
        tokens = self._dropout(tokens, generator)
        layers = self._run(tokens, packing, generator)
        directions = []
        for direction in (0, 1):
            top = layers[-1][direction]
            if self.mix is not None:
                top = self.mix([tokens, *(layer[direction] for layer in layers)])
            directions.append(self._dropout(top, generator))
        return directions[0], directions[1]

    def context_vectors(
        self, rows: Tensor, index: Tensor, packing: Packing, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the context vectors that predict a neighbour, (N, D), those of the forward direction first.

        Of two neighbouring tokens, the forward vector of the left one predicts the right one, and the backward vector
        of the right one predicts the left one. The pairs are in the packed order of the right ones, which are all rows
        from the second step on.

        Args:
            rows: (U, D) embeddings of the distinct words.
            index: Which of ``rows`` each token is, packed int64, on any device.
            packing: The layout of ``index``, on any device.
            generator: As in :meth:`forward`.
        """
        packing = packing.to(rows.device)
        tokens = nn.functional.embedding(index.to(rows.device), rows)
        forward, backward = self(tokens, packing, generator)
        return torch.cat([forward.index_select(0, packing.previous), backward[packing.second_step :]])

    def layers(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Return all layers as contextual embeddings (L + 1, B, T, 2D), in evaluation mode only.

        The last dimension holds the forward, then the backward hidden state; both are zero at padding. Layer 0 is the
        word embedding concatenated with itself, as in ELMo.

        Args:
            tokens: (N, D) word embeddings, packed.
            packing: Their layout, on the same device.
        """
        assert not self.training, "layers() is for evaluation: call eval() first"
        rows = [(tokens, tokens), *self._run(tokens, packing, None)]
        return torch.stack([packing.unpack(torch.cat(both, 1)) for both in rows])

    def _dropout(self, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
        """Apply dropout to packed rows (N, D)."""
        probability = self.options.dropout
        if not self.training or probability == 0.0:
            return tokens
        device = torch.device("cpu") if generator is None else generator.device
        kept = (torch.rand(tokens.shape, generator=generator, device=device) >= probability).to(tokens.device)
        return tokens * kept.to(tokens.dtype).div_(1.0 - probability)

    def _run(
        self, tokens: Tensor, packing: Packing, generator: torch.Generator | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's forward and backward outputs, each (N, D) and packed."""
        if isinstance(self.lstm, FusedElmoLstm):
            return self.lstm.run(tokens, packing, generator)
        if not packing.num_tokens:
            return [(tokens, tokens)] * self.options.num_layers
        if not self.options.stateful:
            self.reset_states()
        padded = packing.unpack(tokens)
        # AllenNLP draws its masks from torch's global generator: seed that one from ours for the duration of the call.
        seeded = self.training and self.options.recurrent_dropout > 0.0 and generator is not None
        with torch.random.fork_rng(devices=[], enabled=seeded):
            if seeded:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            outputs = self.lstm(padded, packing.mask())
        directions = [packing.pack(output).chunk(2, 1) for output in outputs]
        return [(forward, backward) for forward, backward in directions]


def _build_lstm(options: BiLMOptions) -> nn.Module:
    size = options.projection_size
    if options.lstm == "fused":
        return FusedElmoLstm(
            size,
            size,
            options.cell_size,
            options.num_layers,
            recurrent_dropout_probability=options.recurrent_dropout,
            memory_cell_clip_value=options.cell_clip,
            state_projection_clip_value=options.projection_clip,
            stateful=options.stateful,
            precision=options.precision,
        )
    # AllenNLP's constructor draws initial values, which are overwritten later: do not advance torch's global generator.
    with torch.random.fork_rng(devices=[]):
        return reference.elmo_lstm()(
            size,
            size,
            options.cell_size,
            options.num_layers,
            requires_grad=True,
            recurrent_dropout_probability=options.recurrent_dropout,
            memory_cell_clip_value=options.cell_clip,
            state_projection_clip_value=options.projection_clip,
        )
