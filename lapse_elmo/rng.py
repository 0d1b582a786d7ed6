"""Random generators keyed by their purpose: none is global, so no draw depends on draws made elsewhere."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def stream(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Return the NumPy generator for ``purpose`` and ``indices`` (epoch, rank, chunk, ...; each below 2**32)."""
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, indices)))


def torch_stream(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """Return the torch generator, on the CPU, for ``purpose`` and ``indices``."""
    generator = torch.Generator()
    generator.manual_seed(int(_sequence(seed, purpose, indices).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return generator


def _sequence(seed: int, purpose: str, indices: tuple[int, ...]) -> np.random.SeedSequence:
    # SeedSequence would split a larger index into two words, so that two keys could be the same.
    assert all(0 <= index < 2**32 for index in indices), indices
    return np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()), *indices))
