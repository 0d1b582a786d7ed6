"""A fused ElmoLstm: AllenNLP's parameters and results, with one autograd node for the whole of it.

The LSTM with projection of ELMo (Peters et al. 2018; allennlp.modules.elmo_lstm, lstm_cell_with_projection): gates
i, f, g, o; c = clip(i * g + f * c'); h = clip(P (o * tanh(c))), times a dropout mask that is fixed over the sentence;
from the second layer on a layer's input is added to its output, while the recurrent state goes without it.

What makes it fast: the batch is packed by length (no work for padding), and the passes of lapse_elmo.model.lstm_pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lapse_elmo.model.lstm_pass import Layer, LstmPass, Plan
from lapse_elmo.model.packing import Packing
from lapse_elmo.model.products import Matmul

_DIRECTIONS = ("forward", "backward")


class LstmCell(nn.Module):
    """The parameters of one layer in one direction, named as in allennlp's LstmCellWithProjection.

    ``input_linearity.weight`` (4C, input size), ``state_linearity.weight`` (4C, D) and ``.bias`` (4C,), and
    ``state_projection.weight`` (C to D: (D, C)); the gate order is i, f, g, o. They start at zero with forget bias 1;
    see :mod:`lapse_elmo.model.initial_values`.
    """

    def __init__(self, input_size: int, hidden_size: int, cell_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.cell_size = input_size, hidden_size, cell_size
        skip = nn.utils.skip_init
        self.input_linearity = skip(nn.Linear, input_size, 4 * cell_size, bias=False)
        self.state_linearity = skip(nn.Linear, hidden_size, 4 * cell_size, bias=True)
        self.state_projection = skip(nn.Linear, cell_size, hidden_size, bias=False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():
            self.state_linearity.bias[cell_size : 2 * cell_size] = 1.0


class FusedElmoLstm(nn.Module):
    """Drop-in for allennlp's ElmoLstm: its constructor arguments, parameter names, state_dict and results.

    Different on purpose: state passes from one batch to the next only where ``stateful`` is true, never between
    training and evaluation mode, and dropout can be drawn from a generator of the caller's. ``backward`` through one
    call runs once only, for it reuses the buffers of the forward pass; torch refuses a second time with an error.

    Args:
        input_size: Width of the input; from the second layer on the input has ``hidden_size``.
        hidden_size: D, the size of the projected state and of the output per direction.
        cell_size: C, the size of the memory cell.
        num_layers: L.
        requires_grad: Kept for allennlp's signature, where it only decides whether loaded weights are trainable.
        recurrent_dropout_probability: Of each unit of the projected state, one draw for each sentence.
        memory_cell_clip_value: Largest magnitude of a cell; None or 0 means no clipping.
        state_projection_clip_value: Largest magnitude of a projected state; None or 0 means no clipping.
        stateful: Start each batch's sentences in the state in which the last batch's sentence of that row ended.
        precision: Of the products in training mode, ``fp32`` or ``bf16`` (lapse_elmo.model.products); parameters,
            inputs, outputs and gradients stay in the dtype that they have. In evaluation mode nothing is narrowed.
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
        """As nn.Module.train; state is dropped where the mode changes."""
        if mode != self.training:
            self.reset_states()
        super().train(mode)
        return self

    def reset_states(self) -> None:
        """Let the next batch start from zero."""
        self._states = None

    def forward(self, inputs: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """All layers' outputs.

        Args:
            inputs: (B, T, input size) of float32 or float64.
            mask: (B, T) bool, true at tokens, false at the padding that follows them.
            generator: Where dropout masks come from; None means torch's own seeded state.

        Returns:
            (L, B, T, 2D), forward then backward halves, zero at padding.
        """
        packing = Packing.of_mask(mask, inputs.device)
        layers = self.run(packing.pack(inputs), packing, len(mask), generator)
        return torch.stack([packing.unpack(torch.cat(both, 1), *mask.shape) for both in layers])

    def run(
        self, inputs: Tensor, packing: Packing, num_sentences: int, generator: torch.Generator | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """As :meth:`forward` on packed rows.

        Args:
            inputs: (N, input size), packed by ``packing``.
            num_sentences: B, empty sentences counted.

        Returns:
            For each layer the forward and the backward output, each (N, D), both packed by ``packing``.
        """
        masks = [[self._dropout_mask(num_sentences, inputs, generator) for _ in "fb"] for _ in range(self.num_layers)]
        layers, weights = [], []
        for layer in range(self.num_layers):
            layers.append([self._starts(layer, direction, packing, masks[layer][direction]) for direction in (0, 1)])
            for direction in (0, 1):
                cell = self.cell(layer, direction)
                weights += [cell.input_linearity.weight, cell.state_linearity.weight, cell.state_linearity.bias]
                weights.append(cell.state_projection.weight)
        plan = Plan(
            packing, Matmul.of(self.precision if self.training else "fp32", inputs), layers,
            self.memory_cell_clip_value or math.inf, self.state_projection_clip_value or math.inf,
        )
        outputs = LstmPass.apply(inputs, plan, *weights)
        if self.stateful:
            self._keep_states([final for both in plan.finals for final in both], packing, num_sentences)
        return list(zip(outputs[::2], outputs[1::2], strict=True))

    def _dropout_mask(self, num_sentences: int, like: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """(B, D), 0 where a unit is dropped and else 1 / keep; drawn in batch order, so that sorting plays no part."""
        probability = self.recurrent_dropout_probability
        if not (self.training and probability > 0.0):
            return None
        device = torch.device("cpu") if generator is None else generator.device
        kept = torch.rand(num_sentences, self.hidden_size, generator=generator, device=device) > probability
        return kept.to(like.dtype).div_(1.0 - probability).to(like.device)

    def _starts(self, layer: int, direction: int, packing: Packing, dropout_mask: Tensor | None) -> Layer:
        """State and mask of the sorted sentences."""
        mask = None if dropout_mask is None else dropout_mask.index_select(0, packing.order)
        if self._states is None:
            return Layer(None, None, mask)
        states = self._states
        missing = int(packing.order.max()) + 1 - states[0].shape[1] if len(packing.order) else 0
        if missing > 0:
            states = tuple(torch.cat([s, s.new_zeros(len(s), missing, s.shape[2])], 1) for s in states)  # type: ignore
        row = 2 * layer + direction
        hidden, cells = (state[row].index_select(0, packing.order) for state in states)
        return Layer(hidden, cells, mask)

    def _keep_states(self, finals: list[tuple[Tensor, Tensor]], packing: Packing, num_sentences: int) -> None:
        """Remember where the sentences ended, as (2L, B, D) and (2L, B, C); rows without a sentence keep theirs."""
        kept = []
        for index, width in enumerate((self.hidden_size, self.cell_size)):
            new = torch.stack([final[index] for final in finals])
            rows = num_sentences if self._states is None else max(num_sentences, self._states[index].shape[1])
            state = new.new_zeros(len(new), rows, width)
            if self._states is not None:
                state[:, : self._states[index].shape[1]] = self._states[index]
            kept.append(state.index_copy(1, packing.order, new))
        self._states = (kept[0], kept[1])
