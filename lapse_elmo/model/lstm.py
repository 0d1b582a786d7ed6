"""A fused ElmoLstm: AllenNLP's parameters and results, with one autograd node for each layer and direction.

The LSTM with projection of ELMo (Peters et al. 2018; allennlp.modules.elmo_lstm, lstm_cell_with_projection): gates
i, f, g, o; c = clip(i * g + f * c'); h = clip(P (o * tanh(c))), times a dropout mask that is fixed over the sentence;
from the second layer on a layer's input is added to its output, while the recurrent state goes without it.

What makes it fast: the batch is packed by length (no work for padding), the input products of all steps are one matrix
product, the recurrent products go into preallocated buffers, and the backward pass, written by hand, collects the
gates' gradients of all steps in one buffer, so that each weight gradient is one matrix product as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lapse_elmo.model.packing import Packing

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

    :param input_size: width of the input; from the second layer on the input has ``hidden_size``.
    :param hidden_size: D, the size of the projected state and of the output per direction.
    :param cell_size: C, the size of the memory cell.
    :param num_layers: L.
    :param requires_grad: kept for allennlp's signature, where it only decides whether loaded weights are trainable.
    :param recurrent_dropout_probability: of each unit of the projected state, one draw for each sentence.
    :param memory_cell_clip_value: largest magnitude of a cell; None or 0 means no clipping.
    :param state_projection_clip_value: largest magnitude of a projected state; None or 0 means no clipping.
    :param stateful: start each batch's sentences in the state in which the last batch's sentence of that row ended.
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
    ) -> None:
        super().__init__()
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
        """The parameters of a layer; direction 0 is forward and 1 backward."""
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

        :param inputs: (B, T, input size) of float32 or float64.
        :param mask: (B, T) bool, true at tokens, false at the padding that follows them.
        :param generator: where dropout masks come from; None means torch's own seeded state.
        :return: (L, B, T, 2D), forward then backward halves, zero at padding.
        """
        packing = Packing.of_mask(mask)
        layers = self.run(packing.pack(inputs), packing, len(mask), generator)
        return torch.stack([packing.unpack(torch.cat(both, 1), *mask.shape) for both in layers])

    def run(
        self, inputs: Tensor, packing: Packing, num_sentences: int, generator: torch.Generator | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """As :meth:`forward` on packed rows.

        :param inputs: (N, input size), packed by ``packing``.
        :param num_sentences: B, empty sentences counted.
        :return: for each layer the forward and the backward output, each (N, D), both packed by ``packing``.
        """
        masks = [[self._dropout_mask(num_sentences, inputs, generator) for _ in "fb"] for _ in range(self.num_layers)]
        # The backward direction reads every sentence from its end: with mirrored rows it is a forward one.
        streams = [inputs, inputs.index_select(0, packing.mirror)]
        layers: list[tuple[Tensor, Tensor]] = []
        finals: list[tuple[Tensor, Tensor]] = []
        for layer in range(self.num_layers):
            for direction, stream in enumerate(streams):
                cell, dropout_mask = self.cell(layer, direction), masks[layer][direction]
                output, last_cells = _PackedLstm.apply(
                    stream,
                    cell.input_linearity.weight,
                    cell.state_linearity.weight,
                    cell.state_linearity.bias,
                    cell.state_projection.weight,
                    *self._initial_state(layer, direction, packing, inputs),
                    None if dropout_mask is None else dropout_mask.index_select(0, packing.order),
                    packing,
                    self.memory_cell_clip_value or None,
                    self.state_projection_clip_value or None,
                )
                finals.append((output.detach().index_select(0, packing.last), last_cells))
                streams[direction] = output if layer == 0 else output + stream
            layers.append((streams[0], streams[1].index_select(0, packing.mirror)))
        if self.stateful:
            self._keep_states(finals, packing, num_sentences)
        return layers

    def _dropout_mask(self, num_sentences: int, like: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """(B, D), 0 where a unit is dropped and else 1 / keep; drawn in batch order, so that sorting plays no part."""
        probability = self.recurrent_dropout_probability
        if not (self.training and probability > 0.0):
            return None
        device = torch.device("cpu") if generator is None else generator.device
        kept = torch.rand(num_sentences, self.hidden_size, generator=generator, device=device) > probability
        return kept.to(like.dtype).div_(1.0 - probability).to(like.device)

    def _initial_state(
        self, layer: int, direction: int, packing: Packing, like: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Projected state (B, D) and cells (B, C) of the sorted sentences, or None for zero."""
        if self._states is None:
            return None, None
        states = self._states
        missing = int(packing.order.max()) + 1 - states[0].shape[1] if len(packing.order) else 0
        if missing > 0:
            states = tuple(torch.cat([s, s.new_zeros(len(s), missing, s.shape[2])], 1) for s in states)  # type: ignore
        row = 2 * layer + direction
        hidden, cells = (state[row].index_select(0, packing.order) for state in states)
        return hidden.to(like), cells.to(like)

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


class _PackedLstm(torch.autograd.Function):
    """One layer in one direction over packed rows: (N, input size) to (N, D), and the last cells (B, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        input_weight: Tensor,
        state_weight: Tensor,
        bias: Tensor,
        projection: Tensor,
        first_hidden: Tensor | None,
        first_cells: Tensor | None,
        dropout_mask: Tensor | None,
        packing: Packing,
        cell_clip: float | None,
        projection_clip: float | None,
    ) -> tuple[Tensor, Tensor]:
        hidden_size, cell_size = projection.shape
        # The input products of all steps; each step turns its rows into the activated gates, in place.
        gates = torch.addmm(bias, inputs, input_weight.t())
        cells = gates.new_empty(len(inputs), cell_size)
        hidden = gates.new_empty(len(inputs), hidden_size)
        exposed = gates.new_empty(len(packing.order), cell_size)
        before, before_cells = first_hidden, first_cells
        for rows in packing.steps:
            size = rows.stop - rows.start
            if before is not None:
                gates[rows].addmm_(before[:size], state_weight.t())
            _advance_cells(gates[rows], before_cells, cells[rows], exposed[:size], cell_clip)
            now = torch.mm(exposed[:size], projection.t(), out=hidden[rows])
            if projection_clip is not None:
                now.clamp_(-projection_clip, projection_clip)
            if dropout_mask is not None:
                now.mul_(dropout_mask[:size])
            before, before_cells = now, cells[rows]
        given = (inputs, input_weight, state_weight, projection, first_hidden, first_cells, dropout_mask)
        ctx.save_for_backward(*given, gates, cells, hidden)
        ctx.packing, ctx.clips = packing, (cell_clip, projection_clip)
        last_cells = cells.index_select(0, packing.last)
        ctx.mark_non_differentiable(last_cells)
        return hidden, last_cells

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        inputs, input_weight, state_weight, projection, first_hidden, first_cells, dropout_mask = ctx.saved_tensors[:7]
        gates, cells, hidden = ctx.saved_tensors[7:]
        packing: Packing = ctx.packing
        cell_clip, projection_clip = ctx.clips
        passes = _passing(hidden, dropout_mask, projection_clip, packing)
        d_hidden = d_output.clone(memory_format=torch.contiguous_format)
        num_sentences = len(packing.order)
        scratch = [gates.new_empty(num_sentences, cells.shape[1]) for _ in range(3)]
        clipped = torch.empty(scratch[0].shape, dtype=torch.bool, device=cells.device)
        d_cells = torch.zeros_like(scratch[0])
        d_before = torch.zeros_like(d_hidden[:num_sentences])
        for step in reversed(range(len(packing.steps))):
            rows = packing.steps[step]
            size = rows.stop - rows.start
            # d_before and d_cells hold what the step after this one passed back: to fewer sentences, zero for the rest.
            now = d_hidden[rows].add_(d_before[:size])
            if passes is not None:
                now.mul_(passes[rows])
            d_exposed = torch.mm(now, projection, out=scratch[0][:size])
            earlier = cells[packing.steps[step - 1]][:size] if step else first_cells
            work = (scratch[1][:size], scratch[2][:size], clipped[:size])
            _retreat_cells(gates[rows], earlier, cells[rows], d_exposed, d_cells[:size], work, cell_clip)
            if step:
                torch.mm(gates[rows], state_weight, out=d_before[:size])
        # From here on gates holds the gradients of the gates before activation, cells what the projection was given.
        d_inputs = torch.mm(gates, input_weight) if ctx.needs_input_grad[0] else None
        d_state_weight = torch.mm(gates[num_sentences:].t(), hidden.index_select(0, packing.previous))
        if first_hidden is not None:
            d_state_weight.addmm_(gates[:num_sentences].t(), first_hidden)
        d_input_weight, d_projection = torch.mm(gates.t(), inputs), torch.mm(d_hidden.t(), cells)
        weights = (d_input_weight, d_state_weight, gates.sum(0), d_projection)
        return (d_inputs, *weights, None, None, None, None, None, None)


def _advance_cells(gates: Tensor, earlier: Tensor | None, cells: Tensor, exposed: Tensor, clip: float | None) -> None:
    """One step without its matrix products, for n sentences.

    :param gates: (n, 4C) before activation; activated in place.
    :param earlier: (at least n, C) cells of the step before, or None for zero.
    :param cells: (n, C), written. ``exposed``: (n, C), written with o * tanh(cells).
    """
    size, width = cells.shape
    gates[:, : 2 * width].sigmoid_()
    gates[:, 2 * width : 3 * width].tanh_()
    gates[:, 3 * width :].sigmoid_()
    i, f, g, o = gates.chunk(4, 1)
    torch.mul(i, g, out=cells)
    if earlier is not None:
        cells.addcmul_(f, earlier[:size])
    if clip is not None:
        cells.clamp_(-clip, clip)
    torch.tanh(cells, out=exposed).mul_(o)


def _retreat_cells(
    gates: Tensor,
    earlier: Tensor | None,
    cells: Tensor,
    d_exposed: Tensor,
    d_cells: Tensor,
    work: tuple[Tensor, Tensor, Tensor],
    clip: float | None,
) -> None:
    """The gradient of :func:`_advance_cells`, for n sentences.

    :param gates: (n, 4C) activated; replaced by the gradients before activation.
    :param cells: (n, C); replaced by o * tanh(cells), for the gradient of the projection.
    :param d_exposed: (n, C) gradient of ``exposed``; used up.
    :param d_cells: (n, C) gradient from the step after this one; replaced by that for the step before.
    :param work: two (n, C) buffers and a bool one.
    """
    sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
    tanh_backward = torch.ops.aten.tanh_backward.grad_input
    i, f, g, o = gates.chunk(4, 1)
    tanh_cells, product, clipped = work
    torch.tanh(cells, out=tanh_cells)
    torch.mul(d_exposed, tanh_cells, out=product)
    tanh_backward(d_exposed.mul_(o), tanh_cells, grad_input=d_exposed)
    d_cells.add_(d_exposed)
    if clip is not None:
        d_cells.masked_fill_(torch.ge(cells.abs_(), clip, out=clipped), 0.0)
    torch.mul(o, tanh_cells, out=cells)
    sigmoid_backward(product, o, grad_input=o)
    d_input_gate, d_candidate = torch.mul(d_cells, g, out=product), torch.mul(d_cells, i, out=tanh_cells)
    sigmoid_backward(d_input_gate, i, grad_input=i)
    tanh_backward(d_candidate, g, grad_input=g)
    if earlier is None:
        f.zero_()
        return
    torch.mul(d_cells, earlier, out=product)
    d_cells.mul_(f)
    sigmoid_backward(product, f, grad_input=f)


def _passing(hidden: Tensor, dropout_mask: Tensor | None, clip: float | None, packing: Packing) -> Tensor | None:
    """(N, D) factor by which dropout and the projection's clip pass gradients on, or None for 1."""
    if dropout_mask is None:
        return None if clip is None else (hidden.abs() < clip).to(hidden.dtype)
    factor = dropout_mask.index_select(0, packing.sentence)
    return factor if clip is None else factor * (hidden.abs() < factor * clip)
