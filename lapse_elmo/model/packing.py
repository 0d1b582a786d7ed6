"""Packed sequences: the tokens of a batch without padding, time-major, longest sentence first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Layout of a packed batch: the first tokens of all sentences, then all second tokens, and so on.

    It is that of torch's PackedSequence: sentences are sorted by length, longest first, equal lengths in batch order.
    At each step the unfinished sentences are a prefix of the sorted batch. So a step is a contiguous slice of the N
    packed rows, and padding takes no computation.

    Attributes:
        order: Batch rows of the sentences, without empty ones, sorted by length.
        sizes: Number of packed rows of each step (``batch_sizes`` of PackedSequence).
        tokens: (N,) index of each packed row in the flattened (B * T) batch.
        mirror: (N,) permutation that reverses every sentence; it is its own inverse.
        previous: For the rows from the second step on, the packed row of the same sentence one step earlier.
        last: Packed row of the last token of each sorted sentence.
        sentence: (N,) index in the sorted batch of each packed row's sentence.
    """

    order: Tensor
    sizes: list[int]
    tokens: Tensor
    mirror: Tensor
    previous: Tensor
    last: Tensor
    sentence: Tensor

    @property
    def num_tokens(self) -> int:
        """N, the number of packed rows."""
        return len(self.tokens)

    @classmethod
    def of_mask(cls, mask: Tensor, device: torch.device | None = None) -> Packing:
        """Return the packing of a batch.

        Args:
            mask: (B, T) bool, true at tokens, false at the padding after them. A mask on the GPU costs a
                synchronization, a mask on the CPU does not.
            device: Device of the packing's tensors; None means that of ``mask``.

        Raises:
            ValueError: If the mask has another shape or dtype, or padding precedes a token.
        """
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"mask must be a (B, T) bool tensor, got {mask.dtype} of shape {tuple(mask.shape)}")
        device, num_positions = device or mask.device, mask.shape[1]
        # All indices are computed on the host, which needs the step sizes as numbers anyway; a GPU would be waited for
        # at each of them.
        mask = mask.cpu()
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError("mask is true after a false: padding must come after the tokens of a sentence")
        lengths, order = torch.sort(mask.sum(1), descending=True, stable=True)
        num_sentences = int((lengths > 0).sum())
        lengths, order = lengths[:num_sentences], order[:num_sentences]
        longest = int(lengths[0]) if num_sentences else 0
        # A packed row's number is the start of its step plus the sentence's place in the sorted batch: the sentences
        # that have a step are the first ones of the order, so none changes its place from step to step.
        sizes = (lengths[None, :] > torch.arange(longest)[:, None]).sum(1)
        ends = torch.cumsum(sizes, 0)
        starts = ends - sizes
        position = torch.repeat_interleave(torch.arange(longest), sizes)
        sentence = torch.arange(len(position)) - starts[position]
        # The same sentence at the position counted from its end.
        mirror = starts[lengths[sentence] - 1 - position] + sentence
        later = slice(num_sentences, None)
        return cls(
            order=order.to(device),
            sizes=sizes.tolist(),
            tokens=(order[sentence] * num_positions + position).to(device),
            mirror=mirror.to(device),
            previous=(starts[position[later] - 1] + sentence[later]).to(device),
            last=(starts[lengths - 1] + torch.arange(num_sentences)).to(device),
            sentence=sentence.to(device),
        )

    def pack(self, padded: Tensor) -> Tensor:
        """Return the rows (N, width) of the tokens of ``padded`` (B, T, width)."""
        return padded.flatten(0, 1).index_select(0, self.tokens)

    def unpack(self, packed: Tensor, num_sentences: int, num_positions: int) -> Tensor:
        """Return ``packed`` (N, width) as (B, T, width), zero at padding."""
        padded = packed.new_zeros(num_sentences * num_positions, packed.shape[1])
        return padded.index_copy(0, self.tokens, packed).view(num_sentences, num_positions, packed.shape[1])
