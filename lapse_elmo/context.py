"""Context vectors of a batch: the biLM's outputs at the positions that predict a target."""

from __future__ import annotations

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
    device = embedding.device
    embedded = nn.functional.embedding(torch.from_numpy(batch.input_index).to(device), embedding)
    forward, backward = model(embedded, torch.from_numpy(batch.mask), dropout)
    size = forward.shape[-1]
    return torch.cat(
        [
            forward.reshape(-1, size)[torch.from_numpy(batch.forward_places).to(device)],
            backward.reshape(-1, size)[torch.from_numpy(batch.backward_places).to(device)],
        ]
    )
