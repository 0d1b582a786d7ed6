"""Random streams keyed by what they are for: no global generator, nothing depends on the order of calls elsewhere."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def stream(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """The NumPy generator of ``purpose`` and ``indices`` (epoch, rank, chunk ... all from 0 to 2**32 - 1)."""
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, indices)))


def torch_stream(seed: int, purpose: str, *indices: int, device: str | torch.device = "cpu") -> torch.Generator:
    """The torch generator of ``purpose`` and ``indices``."""
    generator = torch.Generator(device)
    generator.manual_seed(int(_sequence(seed, purpose, indices).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return generator


def _sequence(seed: int, purpose: str, indices: tuple[int, ...]) -> np.random.SeedSequence:
    assert all(0 <= index < 2**32 for index in indices), indices  # a larger one would be taken for two
    return np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()), *indices))
