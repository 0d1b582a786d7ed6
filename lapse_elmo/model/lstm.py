"""A fused ElmoLstm: AllenNLP's parameters and results, with all layers in one autograd node.

It computes the LSTM with projection of ELMo (Peters et al. 2018; ``elmo_lstm`` and ``lstm_cell_with_projection`` in
allennlp.modules). With gates i, f, g, o, the cell is c = clip(i * g + f * c'), the hidden state is
h = clip(P (o * tanh(c))), multiplied by a dropout mask that stays the same throughout a sentence. From the second layer
on, a skip connection adds a layer's input to its output, but not to its recurrent state.

It is fast for two reasons: the batch is packed by length, so padding costs nothing, and :mod:`.lstm_pass` implements
the forward and backward pass by hand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lapse_elmo.model.lstm_pass import LayerStart, LstmCall, LstmPass
from lapse_elmo.model.packing import Packing
from lapse_elmo.model.products import Matmul

_DIRECTIONS = ("forward", "backward")


class _ZeroLinear(nn.Linear):
    """A linear layer that starts at 0, without drawing from the global generator as ``nn.Linear`` does.

    ``nn.utils.skip_init`` would avoid that too, but it imports sympy: half a second of every rank's start.
    """

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class LstmCell(nn.Module):
    """The parameters of one layer in one direction, named as in AllenNLP's LstmCellWithProjection.

    They are ``input_linearity.weight`` (4C, input size), ``state_linearity.weight`` (4C, D), ``state_linearity.bias``
    (4C,) and ``state_projection.weight`` (D, C). The gates are in the order i, f, g, o. The constructor sets the forget
    bias to 1 and everything else to 0; :mod:`lapse_elmo.model.initial_values` draws initial values.
    """

    def __init__(self, input_size: int, hidden_size: int, cell_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.cell_size = input_size, hidden_size, cell_size
        self.input_linearity = _ZeroLinear(input_size, 4 * cell_size, bias=False)
        self.state_linearity = _ZeroLinear(hidden_size, 4 * cell_size, bias=True)
        self.state_projection = _ZeroLinear(cell_size, hidden_size, bias=False)
        with torch.no_grad():
            self.state_linearity.bias[cell_size : 2 * cell_size] = 1.0


class FusedElmoLstm(nn.Module):
    """Drop-in replacement for AllenNLP's ElmoLstm: same constructor arguments, parameter names, state_dict and results.

    There are two deliberate differences. State carries over from one batch to the next only if ``stateful`` is true,
    and never between training and evaluation mode. Dropout masks can be drawn from the caller's generator.

    ``backward`` can run only once per call, because it reuses the buffers of the forward pass; a second one raises
    RuntimeError.

    Args:
        input_size: Size of the first layer's input; that of the other layers is ``hidden_size``.
        hidden_size: D, the size of the hidden state and of the output per direction.
        cell_size: C, the size of the cell.
        num_layers: L.
        requires_grad: Unused; present for AllenNLP's signature, where it makes loaded weights trainable.
        recurrent_dropout_probability: Dropout probability for each unit of the hidden state, drawn once per sentence.
        memory_cell_clip_value: Largest magnitude of a cell; None or 0 disables clipping.
        state_projection_clip_value: Largest magnitude of a hidden state; None or 0 disables clipping.
        stateful: Start the sentence in row b of a batch in the final state of row b of the previous batch.
        precision: Precision of the matrix products in training mode, ``fp32`` or ``bf16``
            (:mod:`lapse_elmo.model.products`). Parameters, inputs, outputs and gradients keep their dtype. Evaluation
            mode computes in the dtype of the inputs unless ``eval_precision`` is set.

    Attributes:
        eval_precision: Precision of the matrix products in evaluation mode, ``fp32`` unless a caller changes it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        cell_size: int,
        num_layers: int,
        requires_grad: bool = False,
        recurrent_dropout_probability: float = 0.0,
        memory_cell_clip_value: float | None = None,
        state_projection_clip_value: float | None = None,
        stateful: bool = False,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.precision = precision
        self.eval_precision = "fp32"
        self.input_size, self.hidden_size, self.cell_size = input_size, hidden_size, cell_size
        self.num_layers, self.requires_grad, self.stateful = num_layers, requires_grad, stateful
        self.recurrent_dropout_probability = recurrent_dropout_probability
        self.memory_cell_clip_value = memory_cell_clip_value
        self.state_projection_clip_value = state_projection_clip_value
        self._states: tuple[Tensor, Tensor] | None = None
        for layer in range(num_layers):
            for direction in _DIRECTIONS:
                cell = LstmCell(input_size if layer == 0 else hidden_size, hidden_size, cell_size)
                self.add_module(f"{direction}_layer_{layer}", cell)

    def cell(self, layer: int, direction: int) -> LstmCell:
        """Return the parameters of a layer; direction 0 is forward and 1 backward."""
        return self.get_submodule(f"{_DIRECTIONS[direction]}_layer_{layer}")  # type: ignore[return-value]

    def train(self, mode: bool = True) -> FusedElmoLstm:
        """Set the mode as ``nn.Module.train`` does, and reset the carried state if the mode changes."""
        if mode != self.training:
            self.reset_states()
        super().train(mode)
        return self

    def reset_states(self) -> None:
        """Start the next batch from zero state."""
        self._states = None

    def forward(self, inputs: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the outputs of all layers.

        Args:
            inputs: (B, T, input size), float32 or float64.
            mask: (B, T) bool, true at tokens, false at the padding after them.
            generator: Source of the dropout masks; None means torch's global generator.

        Returns:
            (L, B, T, 2D): forward and backward outputs concatenated, zero at padding.
        """
        packing = Packing.of_mask(mask).to(inputs.device)
        layers = self.run(packing.pack(inputs), packing, generator)
        return torch.stack([packing.unpack(torch.cat(both, 1)) for both in layers])

    def run(
        self, inputs: Tensor, packing: Packing, generator: torch.Generator | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Compute the same as :meth:`forward` on packed rows.

        Args:
            inputs: (N, input size), packed by ``packing``.
            packing: Layout of the rows of ``inputs`` and of the outputs.
            generator: Source of the dropout masks; None means torch's global generator.

        Returns:
            For each layer, the forward and the backward output, each (N, D) and packed.
        """
        num_sentences, num_layers = packing.num_sentences, self.num_layers
        masks = [[self._dropout_mask(num_sentences, inputs, generator) for _ in "fb"] for _ in range(num_layers)]
        layers, weights = [], []
        for layer in range(self.num_layers):
            layers.append([self._initial_state(layer, d, packing, masks[layer][d]) for d in (0, 1)])
            for direction in (0, 1):
                cell = self.cell(layer, direction)
                weights += [cell.input_linearity.weight, cell.state_linearity.weight, cell.state_linearity.bias]
                weights.append(cell.state_projection.weight)
        call = LstmCall(
            packing, Matmul.of(self.precision if self.training else self.eval_precision, inputs), layers,
            self.memory_cell_clip_value or math.inf, self.state_projection_clip_value or math.inf,
        )
        outputs = LstmPass.apply(inputs, call, *weights)
        if self.stateful:
            self._store_states([final for both in call.final_states for final in both], packing)
        return list(zip(outputs[::2], outputs[1::2], strict=True))

    def _dropout_mask(self, num_sentences: int, like: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """Return a mask (B, D) of zeros and 1 / (1 - p), in batch order, so that it does not depend on the sorting."""
        probability = self.recurrent_dropout_probability
        if not (self.training and probability > 0.0):
            return None
        device = torch.device("cpu") if generator is None else generator.device
        kept = torch.rand(num_sentences, self.hidden_size, generator=generator, device=device) > probability
        return kept.to(like.device).to(like.dtype).div_(1.0 - probability)

    def _initial_state(self, layer: int, direction: int, packing: Packing, dropout_mask: Tensor | None) -> LayerStart:
        """Return the initial state and the dropout mask of the sorted sentences."""
        mask = None if dropout_mask is None else dropout_mask.index_select(0, packing.order)
        if self._states is None:
            return LayerStart(None, None, mask)
        states = self._states
        missing = int(packing.order.max()) + 1 - states[0].shape[1] if len(packing.order) else 0
        if missing > 0:
            states = tuple(torch.cat([s, s.new_zeros(len(s), missing, s.shape[2])], 1) for s in states)  # type: ignore
        row = 2 * layer + direction
        hidden, cells = (state[row].index_select(0, packing.order) for state in states)
        return LayerStart(hidden, cells, mask)

    def _store_states(self, finals: list[tuple[Tensor, Tensor]], packing: Packing) -> None:
        """Store the final states, (2L, B, D) and (2L, B, C); rows without a sentence keep their previous state."""
        stored, num_sentences = [], packing.num_sentences
        for index, width in enumerate((self.hidden_size, self.cell_size)):
            new = torch.stack([final[index] for final in finals])
            rows = num_sentences if self._states is None else max(num_sentences, self._states[index].shape[1])
            state = new.new_zeros(len(new), rows, width)
            if self._states is not None:
                state[:, : self._states[index].shape[1]] = self._states[index]
            stored.append(state.index_copy(1, packing.order, new))
        self._states = (stored[0], stored[1])
