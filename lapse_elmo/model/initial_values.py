"""Initial values of the LSTM, drawn from an explicit generator: the same on every rank and for any world size.

Always drawn in float32 on the generator's device, layer by layer, forward before backward, so that neither the dtype
nor the kind of the LSTM changes them. Biases are 0, the forget gate's 1 (Jozefowicz et al. 2015).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LSTM_INITS = ("glorot", "orthogonal")


@torch.no_grad()
def initialize_lstm(lstm: nn.Module, scheme: str, generator: torch.Generator) -> None:
    """Fill an ElmoLstm (fused or AllenNLP's) with initial values.

    Args:
        scheme: ``glorot`` as bilm-tf, whose input and recurrent weights are one kernel of uniform +-sqrt(6 / (input +
            D + 4C)), the projection's limit being sqrt(6 / (C + D)); or ``orthogonal`` as AllenNLP: each gate's block
            of the input and recurrent weights orthogonal, the projection uniform +-1 / sqrt(C).
        generator: Where the values come from; it is advanced.
    """
    fill = {"glorot": _glorot, "orthogonal": _orthogonal}[scheme]
    for layer in range(lstm.num_layers):  # type: ignore[arg-type]
        for direction in ("forward", "backward"):
            cell = lstm.get_submodule(f"{direction}_layer_{layer}")
            fill(cell, generator)
            cell_size = cell.cell_size
            bias: Tensor = cell.state_linearity.bias  # type: ignore[union-attr, assignment]
            bias.zero_()
            bias[cell_size : 2 * cell_size] = 1.0  # type: ignore[operator]


def _glorot(cell: nn.Module, generator: torch.Generator) -> None:
    into, state, projection = _weights(cell)
    limit = math.sqrt(6.0 / (into.shape[1] + state.shape[1] + into.shape[0]))
    _uniform(into, limit, generator)
    _uniform(state, limit, generator)
    _uniform(projection, math.sqrt(6.0 / sum(projection.shape)), generator)


def _orthogonal(cell: nn.Module, generator: torch.Generator) -> None:
    into, state, projection = _weights(cell)
    for weight in (into, state):
        for gate in weight.chunk(4):
            drawn = torch.empty(gate.shape, device=generator.device)
            gate.copy_(nn.init.orthogonal_(drawn, generator=generator))
    _uniform(projection, 1.0 / math.sqrt(projection.shape[1]), generator)


def _weights(cell: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Input (4C, input size), recurrent (4C, D) and projection (D, C) weights."""
    names = ("input_linearity", "state_linearity", "state_projection")
    into, state, projection = (cell.get_parameter(f"{name}.weight") for name in names)
    return into, state, projection


def _uniform(weight: Tensor, limit: float, generator: torch.Generator) -> None:
    drawn = torch.empty(weight.shape, device=generator.device)
    weight.copy_(drawn.uniform_(-limit, limit, generator=generator))
