"""How many sentences a step takes: the global batch, of all workers together, starts small and grows with the tokens.

The gradient noise of a language model is small at first and grows over the first millions of tokens, and with it the
largest batch that still learns as much per token as a small one (the critical batch: McCandlish et al. 2018,
arXiv:1812.06162; a batch warm-up from there: arXiv:2505.23971). A batch of many ranks that is full from the first step
wastes the tokens that teach the most (benchmarks/learning.md).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchGrowth:
    """The law ``global batch = first * (1 + tokens / per_tokens)``, within 1 and ``limit`` sentences per worker.

    It does not depend on the number of workers, which share the global batch equally. Tokens are sentences times their
    mean length, so that a step's size follows from the number of sentences before it alone.

    :ivar limit: sentences per step and worker at most. :ivar first: sentences of all workers at the first step; 0
        means ``limit`` per worker at every step. :ivar per_tokens: tokens in which the batch grows by ``first``; 0
        means that it stays.
    """

    limit: int
    num_workers: int
    first: int = 0
    per_tokens: float = 0.0
    tokens_per_sentence: float = 1.0

    def sentences(self, trained: int) -> int:
        """Sentences per step and worker, once ``trained`` sentences of all workers are trained."""
        if not self.first:
            return self.limit
        grown = trained * self.tokens_per_sentence / self.per_tokens if self.per_tokens else 0.0
        return min(max(round(self.first * (1.0 + grown) / self.num_workers), 1), self.limit)
