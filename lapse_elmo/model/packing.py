"""Packed sequences: the tokens of a batch without padding, time-major, longest sentence first."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Layout of a packed batch: the first tokens of all sentences, then all second tokens, and so on.

    It is that of torch's PackedSequence: sentences are sorted by length, longest first, equal lengths in batch order.
    At each step the unfinished sentences are a prefix of the sorted batch. So a step is a contiguous slice of the N
    packed rows, and padding takes no computation.

    Attributes:
        num_sentences: B, including empty sentences.
        num_positions: T, the width of the padded batch.
        sizes: Number of packed rows of each step (``batch_sizes`` of PackedSequence).
        order: Batch rows of the sentences, without empty ones, sorted by length.
        tokens: (N,) index of each packed row in the flattened (B * T) batch.
        mirror: (N,) permutation that reverses every sentence; it is its own inverse.
        previous: For the rows from the second step on, the packed row of the same sentence one step earlier.
        last: Packed row of the last token of each sorted sentence.
    """

    num_sentences: int
    num_positions: int
    sizes: list[int]
    order: Tensor
    tokens: Tensor
    mirror: Tensor
    previous: Tensor
    last: Tensor

    @property
    def num_tokens(self) -> int:
        """N, the number of packed rows."""
        return len(self.tokens)

    @property
    def second_step(self) -> int:
        """The first packed row of the second step, which is the number of sentences that are not empty."""
        return len(self.order)

    @classmethod
    def of_lengths(cls, lengths: np.ndarray, num_positions: int | None = None) -> Packing:
        """Return the packing of sentences of ``lengths`` (B,), on the CPU.

        It is computed in NumPy: the caller is the thread that reads batches ahead, and torch is busy in another one.

        Args:
            lengths: (B,) int64.
            num_positions: T, at least the largest length; None for that.
        """
        order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
        ordered, num_started = lengths[order], order.size
        longest = int(ordered[0]) if num_started else 0
        # A packed row's number is the start of its step plus the sentence's place in the sorted batch: the sentences
        # that have a step are the first ones of the order, so none changes its place from step to step.
        sizes = num_started - np.searchsorted(ordered[::-1], np.arange(longest), side="right")
        starts = np.cumsum(sizes) - sizes
        position = np.repeat(np.arange(longest), sizes)
        sentence = np.arange(position.size) - starts[position]
        num_positions = longest if num_positions is None else num_positions
        indices = {
            "order": order,
            "tokens": order[sentence] * num_positions + position,
            # The same sentence at the position counted from its end.
            "mirror": starts[ordered[sentence] - 1 - position] + sentence,
            "previous": starts[position[num_started:] - 1] + sentence[num_started:],
            "last": starts[ordered - 1] + np.arange(num_started),
        }
        tensors = {name: torch.from_numpy(values.astype(np.int64, copy=False)) for name, values in indices.items()}
        return cls(lengths.size, num_positions, sizes.tolist(), **tensors)

    @classmethod
    def of_mask(cls, mask: Tensor) -> Packing:
        """Return the packing of a padded batch, on the CPU.

        Args:
            mask: (B, T) bool, true at tokens, false at the padding after them. A mask on the GPU costs a
                synchronization, a mask on the CPU does not.

        Raises:
            ValueError: If the mask has another shape or dtype, or padding precedes a token.
        """
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"mask must be a (B, T) bool tensor, got {mask.dtype} of shape {tuple(mask.shape)}")
        mask = mask.cpu()
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError("mask is true after a false: padding must come after the tokens of a sentence")
        return cls.of_lengths(mask.sum(1).numpy(), mask.shape[1])

    def to(self, device: torch.device) -> Packing:
        """Return this packing with its tensors on ``device``; the sizes stay on the host, which needs them there."""
        if device == self.tokens.device:
            return self
        names = ("order", "tokens", "mirror", "previous", "last")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def mask(self) -> Tensor:
        """Return the mask (B, T) bool of the padded batch."""
        flat = torch.zeros(self.num_sentences * self.num_positions, dtype=torch.bool, device=self.tokens.device)
        return flat.index_fill_(0, self.tokens, 1).view(self.num_sentences, self.num_positions)

    def pack(self, padded: Tensor) -> Tensor:
        """Return the rows (N, width) of the tokens of ``padded`` (B, T, width)."""
        return padded.flatten(0, 1).index_select(0, self.tokens)

    def unpack(self, packed: Tensor) -> Tensor:
        """Return ``packed`` (N, ...) as (B, T, ...), zero at padding."""
        padded = packed.new_zeros(self.num_sentences * self.num_positions, *packed.shape[1:])
        padded = padded.index_copy(0, self.tokens, packed)
        return padded.view(self.num_sentences, self.num_positions, *packed.shape[1:])
