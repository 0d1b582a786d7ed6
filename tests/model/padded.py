"""The biLM on padded batches, for comparison with what takes them: packed, computed, padded again."""

from __future__ import annotations

import torch
from torch import Tensor

from lapse_elmo.model.bilm import BiLM
from lapse_elmo.model.packing import Packing


def outputs_of(
    model: BiLM, embedded: Tensor, mask: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return the context vectors of both directions, each (B, T, D), zero at padding."""
    packing = Packing.of_mask(mask).to(embedded.device)
    forward, backward = model(packing.pack(embedded), packing, generator)
    return packing.unpack(forward), packing.unpack(backward)


def layers_of(model: BiLM, embedded: Tensor, mask: Tensor) -> Tensor:
    """Return all layers (L + 1, B, T, 2D), zero at padding."""
    packing = Packing.of_mask(mask).to(embedded.device)
    return model.layers(packing.pack(embedded), packing)
