"""Hand-written forward and backward pass of the LSTM with projection over packed rows, as a single autograd node.

A layer multiplies all its inputs by the input weights in one matrix product. The products of the recurrence go into
preallocated buffers; where all kernels are in C, one call runs all steps of a layer (:mod:`.lstm_steps`). The backward
pass overwrites the gates of all steps with their gradients, so each weight gradient is a single matrix product as well.
The two directions are independent, so each runs on a thread of its own (:mod:`lapse_elmo.model.two_threads`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lapse_elmo.model.lstm_steps import Layer, native_steps
from lapse_elmo.model.packing import Packing
from lapse_elmo.model.pointwise import pointwise
from lapse_elmo.model.pointwise_torch import wide_dtype
from lapse_elmo.model.products import Matmul
from lapse_elmo.model.two_threads import run_two_threads

WEIGHTS_PER_LAYER = 4


@dataclass(frozen=True)
class LayerStart:
    """Initial state and dropout mask of one layer in one direction, for the sorted sentences.

    Attributes:
        initial_hidden: (B, D) hidden states; None for zero.
        initial_cells: (B, C) cells; None for zero.
        dropout_mask: (B, D) factors of the hidden states at every step; None for no dropout.
    """

    initial_hidden: Tensor | None
    initial_cells: Tensor | None
    dropout_mask: Tensor | None


@dataclass
class LstmCall:
    """Everything that a call of :class:`LstmPass` takes except for its differentiable tensors.

    Attributes:
        packing: Layout of the packed rows.
        matmul: Storage dtype and matrix products.
        layers: Start of each layer and direction, ``layers[layer][direction]``.
        cell_clip: Largest magnitude of a cell; infinite for no clipping.
        projection_clip: Largest magnitude of a hidden state; infinite for no clipping.
        final_states: Output of the forward pass, ``final_states[layer][direction]``: each sorted sentence's last hidden
            state (B, D) and cells (B, C).
    """

    packing: Packing
    matmul: Matmul
    layers: list[list[LayerStart]]
    cell_clip: float
    projection_clip: float
    final_states: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)


class LstmPass(torch.autograd.Function):
    """Autograd function of all layers and both directions: ``LstmPass.apply(inputs, call, *weights)``.

    ``inputs`` is (N, input size), packed. ``weights`` holds four tensors per layer and direction, in the order layer 0
    forward, layer 0 backward, layer 1 forward, ...: input weight (4C, input size), recurrent weight (4C, D), bias (4C,)
    and projection (D, C). The outputs are in the same order, each (N, D) and packed.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, call: LstmCall, *weights: Tensor) -> tuple[Tensor, ...]:
        """Run both directions; see the class."""
        stacks = [_Stack(call, direction, weights) for direction in (0, 1)]
        mirror = call.packing.mirror

        def run(direction: int) -> list[Tensor]:
            if direction == 0:
                return stacks[0].forward(inputs)
            # The backward direction is a forward LSTM over reversed sentences.
            outputs = stacks[1].forward(inputs.index_select(0, mirror))
            return [output.index_select(0, mirror) for output in outputs]

        forward, backward = run_two_threads(run, inputs.device, "LSTM forward (excl. matmul)")
        call.final_states = [[stack.passes[layer].final_state for stack in stacks] for layer in range(len(call.layers))]
        ctx.stacks, ctx.mirror, ctx.device = stacks, mirror, inputs.device
        ctx.set_materialize_grads(False)
        return tuple(output for layer in zip(forward, backward, strict=True) for output in layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``inputs`` and ``weights``; overwrites the buffers of the forward pass."""
        if ctx.stacks is None:
            raise RuntimeError(
                "backward can run only once per call of the fused LSTM: it overwrites the buffers of the forward pass"
            )
        stacks, ctx.stacks = ctx.stacks, None
        mirror = ctx.mirror

        def run(direction: int) -> tuple[Tensor | None, list[tuple[Tensor | None, ...]]]:
            upstream = list(d_outputs[direction::2])
            if direction == 0:
                return stacks[0].backward(upstream, ctx.needs_input_grad[0])
            mirrored = [None if d is None else d.index_select(0, mirror) for d in upstream]
            d_inputs, gradients = stacks[1].backward(mirrored, ctx.needs_input_grad[0])
            return None if d_inputs is None else d_inputs.index_select(0, mirror), gradients

        (d_forward, of_forward), (d_backward, of_backward) = run_two_threads(
            run, ctx.device, "LSTM backward (excl. matmul)"
        )
        d_inputs = d_forward if d_backward is None else d_backward if d_forward is None else d_forward + d_backward
        gradients = [g for layer in zip(of_forward, of_backward, strict=True) for four in layer for g in four]
        return (d_inputs, None, *gradients)


class _Stack:
    """All layers of one direction, with a skip connection around each layer but the first."""

    def __init__(self, call: LstmCall, direction: int, weights: tuple[Tensor, ...]) -> None:
        self.passes = []
        for layer, start in enumerate(call.layers):
            first = WEIGHTS_PER_LAYER * (2 * layer + direction)
            self.passes.append(_LayerPass(call, start[direction], weights[first : first + WEIGHTS_PER_LAYER]))

    def forward(self, inputs: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        for layer in self.passes:
            # Detached: autograd links the output to this node, which holds the layer, so returning the layer's own
            # tensor would create a reference cycle.
            output = layer.forward(outputs[-1] if outputs else inputs).to(inputs.dtype).detach()
            outputs.append(output + outputs[-1] if outputs else output)
        return outputs

    def backward(
        self, d_outputs: list[Tensor | None], needs_inputs: bool
    ) -> tuple[Tensor | None, list[tuple[Tensor | None, ...]]]:
        """Return the gradients of the inputs and of each layer's weights, and release the layers one by one."""
        gradients: list[tuple[Tensor | None, ...]] = []
        d_stream: Tensor | None = None
        while self.passes:
            number, layer = len(self.passes) - 1, self.passes.pop()
            d_own = d_outputs[number]
            d_output = d_own if d_stream is None else d_stream if d_own is None else d_stream + d_own
            if d_output is None:
                gradients.append((None,) * WEIGHTS_PER_LAYER)
                continue
            d_stream, four = layer.backward(d_output, needs_inputs or number > 0)
            if number > 0 and d_stream is not None:
                d_stream += d_output
            gradients.append(four)
        return d_stream, gradients[::-1]


class _LayerPass:
    """Forward and backward pass of one layer in one direction, and the buffers that they share."""

    def __init__(self, call: LstmCall, start: LayerStart, weights: tuple[Tensor, ...]) -> None:
        self.packing, self.matmul = call.packing, call.matmul
        self.clips = call.cell_clip, call.projection_clip
        self.weights = tuple(weight.detach() for weight in weights)
        wide = wide_dtype(self.matmul.storage)
        self.mask = None if start.dropout_mask is None else start.dropout_mask.to(wide)
        self.initial_hidden = None if start.initial_hidden is None else self.matmul.cast(start.initial_hidden)
        self.initial_cells = None if start.initial_cells is None else start.initial_cells.to(wide).contiguous()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the hidden states (N, D) in the storage dtype."""
        matmul = self.matmul
        input_weight, _, _, projection = self.weights
        hidden_size, cell_size = projection.shape
        num_tokens = len(inputs)
        self.inputs = matmul.cast(inputs).detach()
        # The input's contribution to the gates of all steps; each step completes and activates its rows in place.
        self.gates = matmul.mm(self.inputs, matmul.cast_weight(input_weight).t())
        self.cells = self.gates.new_empty(num_tokens, cell_size, dtype=wide_dtype(matmul.storage))
        self.hidden = self.gates.new_empty(num_tokens, hidden_size)
        self._forward_steps()
        last = self.packing.last
        self.final_state = self.hidden.index_select(0, last), self.cells.index_select(0, last)
        return self.hidden

    def _forward_steps(self) -> None:
        """Activate the gates and compute cells and hidden states, from the first step to the last."""
        matmul, sizes = self.matmul, self.packing.sizes
        _, state_weight, bias, projection = self.weights
        cell_output_buffer = self.gates.new_empty(len(self.packing.order), projection.shape[1])
        recurrent_weight, projection_weight = (matmul.prepare(w.t(), sizes) for w in (state_weight, projection))
        bias, (cell_clip, projection_clip) = bias.to(self.cells.dtype), self.clips
        kernels = pointwise(self.gates)
        previous_hidden, previous_cells = self.initial_hidden, self.initial_cells
        in_c = native_steps(kernels, recurrent_weight, projection_weight)
        if in_c is not None:
            in_c.forward(
                self._layer(), self.gates, bias, previous_hidden, self.cells, self.hidden, cell_output_buffer
            )
            return
        steps = zip(sizes, self.gates.split(sizes), self.cells.split(sizes), self.hidden.split(sizes), strict=True)
        for size, gates, cells, hidden in steps:
            if previous_hidden is not None:
                recurrent_weight.addmm_into(gates, previous_hidden[:size])
            cell_output = cell_output_buffer[:size]
            kernels.cell_forward(gates, bias, previous_cells, cells, cell_output, cell_clip)
            projection_weight.mm_into(hidden, cell_output)
            kernels.clip_forward(hidden, self.mask, projection_clip)
            previous_hidden, previous_cells = hidden, cells

    def backward(self, d_output: Tensor, needs_inputs: bool) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Return the gradients of the inputs and of the four weights, in the dtype of ``d_output``."""
        matmul = self.matmul
        d_hidden = d_output.to(matmul.storage, copy=True, memory_format=torch.contiguous_format)
        # Each step's cells are read for the last time just before its cell output is recomputed, so the output may
        # overwrite them if the dtypes are equal.
        same_dtype = self.cells.dtype == self.gates.dtype
        cell_output = self.cells if same_dtype else self.gates.new_empty(self.cells.shape)
        self._backward_steps(d_hidden, cell_output)
        # From here on, gates holds the gradients of the pre-activations.
        gates, num_sentences = self.gates, len(self.packing.order)
        d_input_weight = matmul.sum_outer(gates, self.inputs)
        # The first step read the initial state, every other step the hidden states of the step before.
        d_state_weight = matmul.sum_outer(gates[num_sentences:], self.hidden.index_select(0, self.packing.previous))
        if self.initial_hidden is not None:
            matmul.add_outer_into(d_state_weight, gates[:num_sentences], self.initial_hidden)
        d_bias = pointwise(gates).column_sums(gates).to(d_output.dtype)
        d_projection = matmul.sum_outer(d_hidden, cell_output).to(d_output.dtype)
        d_inputs = None
        if needs_inputs:
            d_inputs = matmul.mm(gates, matmul.cast_weight(self.weights[0])).to(d_output.dtype)
        return d_inputs, (d_input_weight.to(d_output.dtype), d_state_weight.to(d_output.dtype), d_bias, d_projection)

    def _backward_steps(self, d_hidden: Tensor, cell_output: Tensor) -> None:
        """Backpropagate from the last step to the first.

        The gates are overwritten with the gradients of their pre-activations.

        Args:
            d_hidden: (N, D) gradient from the layer above; replaced by the gradient before clipping and dropout.
            cell_output: (N, C), written with o * tanh(cells).
        """
        matmul, sizes, num_sentences = self.matmul, self.packing.sizes, len(self.packing.order)
        recurrent_weight, projection_weight = (matmul.prepare(self.weights[number], sizes) for number in (1, 3))
        cell_clip, projection_clip = self.clips
        kernels = pointwise(self.gates)
        # Gradient that a step passes back to the step before. An earlier step has at least as many sentences; the rows
        # of sentences that end there stay zero.
        d_recurrent = torch.zeros_like(d_hidden[:num_sentences])
        d_cells = self.cells.new_zeros(num_sentences, self.cells.shape[1])
        d_cell_output = self.gates.new_empty(d_cells.shape)
        in_c = native_steps(kernels, recurrent_weight, projection_weight)
        if in_c is not None:
            in_c.backward(
                self._layer(), self.gates, self.cells, self.hidden, d_hidden, cell_output, d_recurrent, d_cells,
                d_cell_output,
            )
            return
        parts = (self.gates, self.cells, self.hidden, d_hidden, cell_output)
        steps = list(zip(sizes, *(part.split(sizes) for part in parts), strict=True))
        for number in reversed(range(len(steps))):
            size, gates, cells, hidden, d_step, step_output = steps[number]
            kernels.clip_backward(d_step, d_recurrent, hidden, self.mask, projection_clip)
            d_step_output = projection_weight.mm_into(d_cell_output[:size], d_step)
            previous_cells = steps[number - 1][2] if number else self.initial_cells
            kernels.cell_backward(gates, previous_cells, cells, step_output, d_step_output, d_cells[:size], cell_clip)
            if number:
                recurrent_weight.mm_into(d_recurrent[:size], gates)

    def _layer(self) -> Layer:
        """Return what the steps in C share."""
        return Layer(self.packing.sizes, self.initial_cells, self.mask, *self.clips)
