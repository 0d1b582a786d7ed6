"""The size of the global batch, which starts small and grows with the tokens trained.

The gradient noise of a language model is small at first and grows over the first millions of tokens, and with it the
largest batch that still learns as much per token as a small one (the critical batch: McCandlish et al. 2018,
arXiv:1812.06162; a batch warm-up from there: arXiv:2505.23971). If many ranks use full batches from the first
step, they waste the tokens from which the model learns most (benchmarks/learning.md).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchGrowth:
    """The law ``global batch = first * (1 + tokens / per_tokens)``, of at most ``limit`` sentences per worker.

    The global batch does not depend on the number of workers, which share it equally; if there are more workers than
    sentences, they take turns. Tokens are counted as sentences times their mean length, so the size of a step depends
    only on the number of sentences trained before it.

    Attributes:
        limit: Most sentences per step and worker.
        num_workers: Workers that share the global batch.
        first: Sentences of all workers at the first step; 0 means ``limit`` per worker at every step.
        per_tokens: Tokens after which the batch has grown by ``first``; 0 means that it does not grow.
        tokens_per_sentence: Mean length of a sentence.
    """

    limit: int
    num_workers: int
    first: int = 0
    per_tokens: float = 0.0
    tokens_per_sentence: float = 1.0

    def sentences(self, trained: int) -> int:
        """Return the sentences per step and worker that takes part, after ``trained`` sentences of all workers."""
        return min(max(round(self._per_worker(trained)), 1), self.limit)

    def turns(self, trained: int) -> int:
        """Return T, if one in T workers takes part in each step, and each worker in one of T steps."""
        return max(round(1 / self._per_worker(trained)), 1)

    def fulfilled(self, trained: int) -> float:
        """Return the fraction, at most 1, of the batch of this law that ``limit`` sentences per worker make up."""
        return min(self.limit / self._per_worker(trained), 1.0)

    def _per_worker(self, trained: int) -> float:
        if not self.first:
            return float(self.limit)
        # Nothing else may enter: every rank must compute the same size, also after a resume.
        grown = trained * self.tokens_per_sentence / self.per_tokens if self.per_tokens else 0.0
        return self.first * (1.0 + grown) / self.num_workers
