"""The log-uniform law: nearly Zipf's law for classes in the order of frequency."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

A = TypeVar("A", np.ndarray, Tensor)


def log_uniform_probability(classes: A, num_classes: int) -> A:
    """Return P(k) = log((k + 2) / (k + 1)) / log(V + 1), the chance that one draw gives class k.

    Source: TensorFlow's log-uniform candidate sampler.

    Args:
        classes: Integer classes in [0, V), any shape, as an array or a tensor (on any device).
        num_classes: V.

    Returns:
        float64, of the same shape and kind as ``classes``.
    """
    if isinstance(classes, Tensor):
        return torch.log1p(1.0 / (classes.to(torch.float64) + 1.0)) / math.log(num_classes + 1.0)
    return np.log1p(1.0 / (classes.astype(np.float64) + 1.0)) / np.log(num_classes + 1.0)
