"""Signals that ask for an end are noted; a second Ctrl-C is not."""

from __future__ import annotations

import signal

import pytest

from lapse_elmo.mpi import signals
from lapse_elmo.mpi.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_noted(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.asked == ""
        signal.raise_signal(number)
        assert stop.asked == number.name
        signal.raise_signal(signal.SIGUSR1)
        assert stop.asked == number.name
    assert signal.getsignal(number) is before


def test_a_second_interrupt_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    stopped: list[float] = []
    with StopSignals() as stop:
        stop.at_once = lambda: stopped.append(now[0])
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same key, which the launcher has passed on too
        assert not stopped
        now[0] += 1
        signal.raise_signal(signal.SIGTERM)
        assert not stopped
        signal.raise_signal(signal.SIGINT)
        assert stopped == [101.0]
    assert stop.asked == "SIGTERM"
