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
    packing = batch.packing.to(embedding.device)
    tokens = nn.functional.embedding(torch.from_numpy(batch.input_index).to(embedding.device), embedding)
    forward, backward = model(tokens, packing, dropout)
    # In the order of make_batch: a pair of neighbours is predicted from the left one forward, from the right one
    # backward. The right ones are all rows from the second step on.
    return torch.cat([forward.index_select(0, packing.previous), backward[packing.second_step :]])
