"""The segments that the contract is checked on, and short helpers to name and read their rows."""

from __future__ import annotations

import numpy as np

from lapse_elmo.ps.api import ParameterServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.rules import Rule

NUM_SAMPLED = 400
WIDTH = 8192  # copying such a row takes long enough for two ranks to collide in it unless a lock keeps them apart
# Long enough that one call spans several of an engine's internal chunks; single rows and odd widths at the edges.
LAYOUT = Layout.of(
    ("single", 1, 1), ("long", 5000, 3), ("wide", 32, WIDTH), ("sampled", NUM_SAMPLED, 4),
    ("adagrad", 40, 5, Rule("adagrad", epsilon=0.5)), ("per row", 40, 7, Rule("adagrad", per_row=True, epsilon=0.5)),
    ("descent", 40, 2, Rule("sgd")),
)
HOT = 6


def every_key(name: str) -> np.ndarray:
    return LAYOUT[name].keys(np.arange(LAYOUT[name].num_rows))


def pulled(server: ParameterServer, keys: np.ndarray) -> np.ndarray:
    segment = LAYOUT.segment_of(int(keys.min()), int(keys.max()))
    assert segment is not None
    out = np.full((keys.size, segment.width), np.nan, np.float32)
    server.pull(keys, out)
    return out


def ones(keys: np.ndarray, factor: float = 1) -> np.ndarray:
    """Return deltas (n, width) that are all ``factor``."""
    segment = LAYOUT.segment_of(int(keys.min()), int(keys.max()))
    assert segment is not None
    return np.full((keys.size, segment.width), factor, np.float32)
