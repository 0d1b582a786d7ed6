"""Checkpoints that are kept because a given number of tokens was trained (``--save-at-tokens``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Milestones:
    """Counts the tokens of a run, and remembers the steps at which it passed the wanted numbers.

    Attributes:
        num_tokens: Tokens that all ranks have trained.
        reached: The step at which each number of tokens was passed.

    Args:
        wanted: Numbers of tokens of all ranks, in any order.
        saved: The result of :meth:`plain` when the run was saved; None for a new run.
    """

    def __init__(self, wanted: Sequence[int], saved: dict[str, Any] | None = None) -> None:
        self.num_tokens = saved["num_tokens"] if saved else 0
        self.reached: dict[int, int] = dict(saved["reached"]) if saved else {}
        waiting = saved.get("waiting", []) if saved else []
        self._left = sorted(tokens for tokens in set(wanted) if tokens > self.num_tokens or tokens in waiting)

    def add(self, num_tokens: int, step: int, *, savable: bool = True) -> bool:
        """Count the tokens of a step; return whether a checkpoint must be saved at this step and kept.

        Args:
            num_tokens: Tokens that all ranks have trained in the step.
            step: The number of the step.
            savable: Whether a checkpoint can be saved at this step; else it waits for the next one at which it can.
        """
        self.num_tokens += num_tokens
        if not savable:
            return False
        passed = [tokens for tokens in self._left if tokens <= self.num_tokens]
        self._left = self._left[len(passed) :]
        self.reached |= dict.fromkeys(passed, step)
        return bool(passed)

    @property
    def steps(self) -> set[int]:
        """The steps whose checkpoints are kept."""
        return set(self.reached.values())

    def plain(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        return {
            "num_tokens": self.num_tokens, "reached": [list(pair) for pair in self.reached.items()],
            "waiting": [tokens for tokens in self._left if tokens <= self.num_tokens],
        }
