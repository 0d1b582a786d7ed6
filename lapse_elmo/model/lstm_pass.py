"""Forward and backward pass of the LSTM with projection over packed rows, written by hand: one autograd node in all.

All input products of a layer are one matrix product, the recurrent products go into preallocated buffers, and the
backward pass turns the gates into their gradients in place, so that each weight gradient is one matrix product as well.
The directions do not meet before the top: they run on a thread each (:mod:`lapse_elmo.model.two_threads`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lapse_elmo.model.packing import Packing
from lapse_elmo.model.pointwise import pointwise
from lapse_elmo.model.pointwise_torch import wide_dtype
from lapse_elmo.model.products import Matmul
from lapse_elmo.model.two_threads import run_two_threads

NUM_WEIGHTS = 4


@dataclass(frozen=True)
class Layer:
    """What one layer starts from, of sorted sentences: (B, D) projected states and (B, C) cells, None for zero, and
    the (B, D) dropout mask of its projected states, None for none."""

    first_hidden: Tensor | None
    first_cells: Tensor | None
    dropout_mask: Tensor | None


@dataclass
class Plan:
    """How a pass goes.

    ``layers[layer][direction]``; the clips are infinite where there is none. ``finals`` is filled by the pass, in the
    same order: each sentence's last projected state (B, D) and cells (B, C).
    """

    packing: Packing
    matmul: Matmul
    layers: list[list[Layer]]
    cell_clip: float
    projection_clip: float
    finals: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)


class LstmPass(torch.autograd.Function):
    """``apply(inputs (N, input size), plan, weights...)``: outputs of layer 0 forward, 0 backward, 1 forward, ..., each
    (N, D) and packed alike. Weights come in the same order, four a layer and direction: of the input (4C, input size),
    of the state (4C, D), bias (4C,), projection (D, C)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, plan: Plan, *weights: Tensor) -> tuple[Tensor, ...]:
        stacks = [_Stack(plan, direction, weights) for direction in (0, 1)]
        mirror = plan.packing.mirror

        def run(direction: int) -> list[Tensor]:
            if direction == 0:
                return stacks[0].forward(inputs)
            # It reads every sentence from its end: with mirrored rows it is a forward one.
            outputs = stacks[1].forward(inputs.index_select(0, mirror))
            return [output.index_select(0, mirror) for output in outputs]

        forward, backward = run_two_threads(run, inputs.device, "LSTM forward (excl. matmul)")
        plan.finals = [[stack.passes[layer].final for stack in stacks] for layer in range(len(plan.layers))]
        ctx.stacks, ctx.mirror, ctx.device = stacks, mirror, inputs.device
        ctx.set_materialize_grads(False)
        return tuple(output for layer in zip(forward, backward, strict=True) for output in layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.stacks is None:
            raise RuntimeError("backward runs once for a call of the fused LSTM: it has used up the forward buffers")
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
    """One direction: its layers on top of each other, each but the first with its input added to its output."""

    def __init__(self, plan: Plan, direction: int, weights: tuple[Tensor, ...]) -> None:
        self.passes = []
        for layer, starts in enumerate(plan.layers):
            first = NUM_WEIGHTS * (2 * layer + direction)
            self.passes.append(_LayerPass(plan, starts[direction], weights[first : first + NUM_WEIGHTS]))

    def forward(self, inputs: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        for layer in self.passes:
            # Not the tensor that the layer keeps: autograd makes the output point to its node, which has the layer.
            output = layer.forward(outputs[-1] if outputs else inputs).to(inputs.dtype).detach()
            outputs.append(output + outputs[-1] if outputs else output)
        return outputs

    def backward(
        self, d_outputs: list[Tensor | None], needs_inputs: bool
    ) -> tuple[Tensor | None, list[tuple[Tensor | None, ...]]]:
        """Gradient of the inputs, and of each layer's weights; uses the layers up."""
        gradients: list[tuple[Tensor | None, ...]] = []
        d_stream: Tensor | None = None
        while self.passes:
            number, layer = len(self.passes) - 1, self.passes.pop()
            d_own = d_outputs[number]
            d_output = d_own if d_stream is None else d_stream if d_own is None else d_stream + d_own
            if d_output is None:
                gradients.append((None,) * NUM_WEIGHTS)
                continue
            d_stream, four = layer.backward(d_output, needs_inputs or number > 0)
            if number > 0 and d_stream is not None:
                d_stream += d_output
            gradients.append(four)
        return d_stream, gradients[::-1]


class _LayerPass:
    """One layer in one direction: its forward pass, and what its backward pass needs of it."""

    def __init__(self, plan: Plan, starts: Layer, weights: tuple[Tensor, ...]) -> None:
        self.packing, self.matmul = plan.packing, plan.matmul
        self.clips = plan.cell_clip, plan.projection_clip
        self.weights = tuple(weight.detach() for weight in weights)
        wide = wide_dtype(self.matmul.storage)
        self.mask = None if starts.dropout_mask is None else starts.dropout_mask.to(wide)
        self.first_hidden = None if starts.first_hidden is None else self.matmul.cast(starts.first_hidden)
        self.first_cells = None if starts.first_cells is None else starts.first_cells.to(wide).contiguous()

    def forward(self, inputs: Tensor) -> Tensor:
        """Projected states (N, D) in the storage dtype."""
        matmul, sizes = self.matmul, self.packing.sizes
        input_weight, state_weight, bias, projection = self.weights
        hidden_size, cell_size = projection.shape
        num_tokens, num_sentences = len(inputs), len(self.packing.order)
        self.inputs = matmul.cast(inputs).detach()
        # The input products of all steps; each step turns its rows into the activated gates.
        self.gates = matmul.mm(self.inputs, matmul.cast_weight(input_weight).t())
        self.cells = self.gates.new_empty(num_tokens, cell_size, dtype=wide_dtype(matmul.storage))
        self.hidden = self.gates.new_empty(num_tokens, hidden_size)
        cell_output_buffer = self.gates.new_empty(num_sentences, cell_size)
        to_gates, to_hidden = (matmul.prepare(weight.t(), sizes) for weight in (state_weight, projection))
        bias, (cell_clip, projection_clip) = bias.to(self.cells.dtype), self.clips
        kernels = pointwise(self.gates)
        previous_hidden, previous_cells = self.first_hidden, self.first_cells
        steps = zip(sizes, self.gates.split(sizes), self.cells.split(sizes), self.hidden.split(sizes), strict=True)
        for size, gates, cells, hidden in steps:
            if previous_hidden is not None:
                to_gates.addmm_into(gates, previous_hidden[:size])
            cell_output = cell_output_buffer[:size]
            kernels.cell_forward(gates, bias, previous_cells, cells, cell_output, cell_clip)
            to_hidden.mm_into(hidden, cell_output)
            kernels.clip_forward(hidden, self.mask, projection_clip)
            previous_hidden, previous_cells = hidden, cells
        last = self.packing.last
        self.final = self.hidden.index_select(0, last), self.cells.index_select(0, last)
        return self.hidden

    def backward(self, d_output: Tensor, needs_inputs: bool) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Gradients of the inputs and of the four weights, in the dtype of ``d_output``."""
        matmul = self.matmul
        d_hidden = d_output.to(matmul.storage, copy=True, memory_format=torch.contiguous_format)
        # The cells are used up step by step: what the projection was given takes their place where it fits.
        fits = self.cells.dtype == self.gates.dtype
        cell_output = self.cells if fits else self.gates.new_empty(self.cells.shape)
        self._through_steps(d_hidden, cell_output)
        # From here on gates holds the gradients of the gates before activation.
        gates, num_sentences = self.gates, len(self.packing.order)
        d_input_weight = matmul.mm(gates.t(), self.inputs)
        # A step has read what the one before it gave, the first one what the batch began with.
        d_state_weight = matmul.mm(gates[num_sentences:].t(), self.hidden.index_select(0, self.packing.previous))
        if self.first_hidden is not None:
            matmul.addmm_into(d_state_weight, gates[:num_sentences].t(), self.first_hidden)
        d_bias = pointwise(gates).column_sums(gates).to(d_output.dtype)
        d_projection = matmul.mm(d_hidden.t(), cell_output).to(d_output.dtype)
        d_inputs = None
        if needs_inputs:
            d_inputs = matmul.mm(gates, matmul.cast_weight(self.weights[0])).to(d_output.dtype)
        return d_inputs, (d_input_weight.to(d_output.dtype), d_state_weight.to(d_output.dtype), d_bias, d_projection)

    def _through_steps(self, d_hidden: Tensor, cell_output: Tensor) -> None:
        """From the last step to the first: ``d_hidden`` and the gates become gradients before clip and activation.

        Args:
            d_hidden: (N, D) gradient from above.
            cell_output: (N, C), written with o * tanh(cells).
        """
        matmul, sizes, num_sentences = self.matmul, self.packing.sizes, len(self.packing.order)
        to_previous, to_cell_output = (matmul.prepare(self.weights[number], sizes) for number in (1, 3))
        cell_clip, projection_clip = self.clips
        kernels = pointwise(self.gates)
        # What a step passes back to the one before it, which has as many sentences or more: zero for the further ones.
        d_recurrent = torch.zeros_like(d_hidden[:num_sentences])
        d_cells = self.cells.new_zeros(num_sentences, self.cells.shape[1])
        d_cell_output = self.gates.new_empty(d_cells.shape)
        parts = (self.gates, self.cells, self.hidden, d_hidden, cell_output)
        steps = list(zip(sizes, *(part.split(sizes) for part in parts), strict=True))
        for number in reversed(range(len(steps))):
            size, gates, cells, hidden, d_step, step_output = steps[number]
            kernels.clip_backward(d_step, d_recurrent, hidden, self.mask, projection_clip)
            d_step_output = to_cell_output.mm_into(d_cell_output[:size], d_step)
            previous_cells = steps[number - 1][2] if number else self.first_cells
            kernels.cell_backward(gates, previous_cells, cells, step_output, d_step_output, d_cells[:size], cell_clip)
            if number:
                to_previous.mm_into(d_recurrent[:size], gates)
