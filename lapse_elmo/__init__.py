"""Sparse ELMo: a bidirectional LSTM language model trained through a parameter server on MPI ranks.

``lapse_elmo.load(PATH)`` opens a trained model (:func:`lapse_elmo.trained.load`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapse_elmo.trained import TrainedModel, load

__version__ = "0.1.0"
__all__ = ["TrainedModel", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import the model's API on first use, so that ``import lapse_elmo`` alone does not import torch."""
    if name in ("TrainedModel", "load"):
        import importlib

        return getattr(importlib.import_module("lapse_elmo.trained"), name)
    raise AttributeError(f"module 'lapse_elmo' has no attribute {name!r}")
