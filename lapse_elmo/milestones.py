"""Checkpoints that stay because so many tokens were trained (``--save-at-tokens``), and the count of those tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Milestones:
    """Which numbers of tokens a run has passed, and at which steps.

    :param wanted: numbers of tokens of all ranks, in any order.
    :param saved: what :meth:`plain` gave when the run was saved, or None at its beginning.
    """

    def __init__(self, wanted: Sequence[int], saved: dict[str, Any] | None = None) -> None:
        self.num_tokens = saved["num_tokens"] if saved else 0
        self.reached: dict[int, int] = dict(saved["reached"]) if saved else {}
        self._left = sorted(tokens for tokens in set(wanted) if tokens > self.num_tokens)

    def add(self, num_tokens: int, step: int) -> bool:
        """Count a step's tokens; whether the checkpoint of this step is one to save and keep."""
        self.num_tokens += num_tokens
        passed = [tokens for tokens in self._left if tokens <= self.num_tokens]
        self._left = self._left[len(passed) :]
        self.reached |= dict.fromkeys(passed, step)
        return bool(passed)

    @property
    def steps(self) -> set[int]:
        """The steps whose checkpoints stay."""
        return set(self.reached.values())

    def plain(self) -> dict[str, Any]:
        """For the manifest."""
        return {"num_tokens": self.num_tokens, "reached": [list(pair) for pair in self.reached.items()]}
