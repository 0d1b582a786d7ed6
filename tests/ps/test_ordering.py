"""The memory fence without a compiler."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from lapse_elmo import native
from lapse_elmo.errors import ConfigError
from lapse_elmo.ps.ordering import fence


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(native.SWITCH, "0")
    fence.cache_clear()
    yield
    fence.cache_clear()


@pytest.mark.parametrize("machine", ["aarch64", "loongarch64"])
def test_a_processor_that_reorders_needs_a_barrier(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(syscall=lambda *_: -1))
    with pytest.raises(ConfigError, match="membarrier"):
        fence()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(syscall=lambda *_: 0))
    assert fence()() == 0


def test_a_processor_that_does_not_reorder_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert fence()() is None
