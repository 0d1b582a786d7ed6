"""Context vectors of a batch: the biLM's outputs at the positions that predict a target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lapse_elmo.batches import Batch
from lapse_elmo.model.bilm import BiLM


def context_vectors(model: BiLM, embedding: Tensor, batch: Batch, dropout: torch.Generator | None) -> Tensor:
    """Return the context vectors (N, D) of a batch, forward ones first, in the order of ``batch.target_rows``.

    Args:
        model: The biLM.
        embedding: (U, D), the weights of ``batch.input_rows``.
        batch: The batch.
        dropout: The random generator of dropout; None for no dropout.
    """
    embedded = nn.functional.embedding(torch.from_numpy(batch.input_index).to(embedding.device), embedding)
    return outputs_at_targets(model(embedded, torch.from_numpy(batch.mask), dropout), batch)


def outputs_at_targets(outputs: Sequence[Tensor], batch: Batch) -> Tensor:
    """Return the forward and backward outputs, each (B, T, D), at the positions that predict a target: (N, D)."""
    places = (batch.forward_places, batch.backward_places)
    return torch.cat(
        [
            output.reshape(-1, output.shape[-1])[torch.from_numpy(place).to(output.device)]
            for output, place in zip(outputs, places, strict=True)
        ]
    )
