"""Where the tokens of a batch lie when they are packed time-major, longest sentence first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """A batch packed by length: all first tokens, then all second ones, and so on, longest sentences first.

    At each step the sentences that still run are a prefix of the sorted batch, so a step is one contiguous slice of
    the packed rows and no work is done for padding. Sentences of equal length keep their order.

    ``order`` holds the batch rows of the sentences that are not empty, longest first; ``sizes`` the number of packed
    rows of each step; ``tokens`` the (N,) index of each packed row in the flattened (B * T) batch; ``mirror`` the
    packed row of the token that is as far from its sentence's end as this one from its start (its own inverse);
    ``previous`` the packed rows one step earlier of the rows from the second step on; ``last`` the packed row of each
    sorted sentence's last token; ``sentence`` the sorted sentence of each packed row.
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
        return len(self.tokens)

    @classmethod
    def of_mask(cls, mask: Tensor, device: torch.device | None = None) -> Packing:
        """Return the packing of a (B, T) bool mask that is true at tokens and false at the padding after them.

        Args:
            device: Where its tensors go; the mask's own device if None. A mask in the host's memory spares a GPU a
                wait.

        Raises:
            ValueError: Where padding comes before a token.
        """
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"mask must be a (B, T) bool tensor, got {mask.dtype} of shape {tuple(mask.shape)}")
        device, num_positions = device or mask.device, mask.shape[1]
        mask = mask.cpu()
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError("mask is true after a false: padding must come after the tokens of a sentence")
        lengths, order = torch.sort(mask.sum(1), descending=True, stable=True)
        num_sentences = int((lengths > 0).sum())
        lengths, order = lengths[:num_sentences], order[:num_sentences]
        longest = int(lengths[0]) if num_sentences else 0
        sizes = (lengths[None, :] > torch.arange(longest)[:, None]).sum(1)
        ends = torch.cumsum(sizes, 0)
        starts = ends - sizes
        position = torch.repeat_interleave(torch.arange(longest), sizes)
        sentence = torch.arange(len(position)) - starts[position]
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
        """(B, T, width) to (N, width)."""
        return padded.flatten(0, 1).index_select(0, self.tokens)

    def unpack(self, packed: Tensor, num_sentences: int, num_positions: int) -> Tensor:
        """(N, width) to (B, T, width), zero at padding."""
        padded = packed.new_zeros(num_sentences * num_positions, packed.shape[1])
        return padded.index_copy(0, self.tokens, packed).view(num_sentences, num_positions, packed.shape[1])
