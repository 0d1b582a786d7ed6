"""Calls that a parameter server must refuse, by name, each with a pattern that its message must match.

Segments are those of ``contract_program.LAYOUT``: key 0 ``single`` (width 1), keys 1 to 5000 ``long`` (width 3).
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from lapse_elmo.errors import ServerError
from lapse_elmo.ps.api import ParameterServer, ServerStats

Refusal = tuple[Callable[[Any], object], str]

KEYS = np.array([4, 5])
ROWS = np.ones((2, 3), np.float32)
_NUM_KEYS = 1 + 5000 + 32 + 400 + 3 * 40
RULED = np.array([5433, 5434])  # keys of a segment of width 5 with an update rule


def _fresh() -> np.ndarray:
    return np.ones((2, 3), np.float32)


def _on(call: Callable[[Any, Any], object], argument: Any, server: ParameterServer) -> object:
    return call(server, argument)


def _key_refusals() -> dict[str, Refusal]:
    """Return refused calls of every verb that takes keys."""
    verbs: dict[str, Callable[[Any, Any], object]] = {
        "pull": lambda server, keys: server.pull(keys, _fresh()),
        "push": lambda server, keys: server.push(keys, _fresh()),
        "set": lambda server, keys: server.set(keys, _fresh()),
        "localize": lambda server, keys: server.localize(keys),
        "intent": lambda server, keys: server.intent(keys, 0, 1),
    }
    bad: dict[str, tuple[Any, str]] = {
        "negative key": (np.array([4, -1]), r"^keys: -1 is outside \[0, "),
        "key too large": (np.array([_NUM_KEYS, 4]), rf"^keys: {_NUM_KEYS} is outside \[0, {_NUM_KEYS}\)"),
        "int32 keys": (np.array([4, 5], np.int32), r"^keys should be int64, not int32"),
        "float keys": (np.array([4.0, 5.0]), r"^keys should be int64, not float64"),
        "bfloat16 keys": (torch.tensor([4.0, 5.0]).bfloat16(), r"^keys should be int64"),
        "keys of two dimensions": (np.array([[4], [5]]), r"^keys should be .* one dimension, not .*\(2, 1\)"),
        "strided keys": (np.array([4, 9, 5, 9])[::2], r"^keys should be contiguous"),
        "keys in a list": ([4, 5], r"^keys should be a NumPy array or a torch tensor, not list"),
        "keys of two segments": (np.array([0, 4]), r"^keys: 0 and 4 belong to different segments"),
    }
    return {
        f"{verb} with {name}": (partial(_on, call, keys), pattern)
        for verb, call in verbs.items() for name, (keys, pattern) in bad.items()
    }


def _value_refusals() -> dict[str, Refusal]:
    """Return refused calls of every verb that takes values."""
    verbs: dict[str, tuple[str, Callable[[Any, Any], object]]] = {
        "pull": ("out", lambda server, rows: server.pull(KEYS, rows)),
        "push": ("values", lambda server, rows: server.push(KEYS, rows)),
        "set": ("values", lambda server, rows: server.set(KEYS, rows)),
    }
    bad: dict[str, tuple[Any, str]] = {
        "float64 rows": (ROWS.astype(np.float64), "should be float32, not float64"),
        "bfloat16 rows": (torch.ones(2, 3, dtype=torch.bfloat16), "should be float32, not torch.bfloat16"),
        "too few rows": (ROWS[:1], r"should have shape \(2, 3\), not \(1, 3\)"),
        "rows of another width": (np.ones((2, 4), np.float32), r"should have shape \(2, 3\), not \(2, 4\)"),
        "flat rows": (np.ones(6, np.float32), r"should have shape \(2, 3\), not \(6,\)"),
        "transposed rows": (np.ones((3, 2), np.float32).T, "should be contiguous"),
        "a strided tensor": (torch.ones(2, 6)[:, ::2], "should be contiguous"),
        "a tensor that needs a gradient": (torch.ones(2, 3, requires_grad=True), "should not require a gradient"),
        "a tensor off the host": (torch.ones(2, 3, device="meta"), "should be in host memory, not on meta"),
        "rows in a list": ([[1.0] * 3] * 2, "should be a NumPy array or a torch tensor, not list"),
    }
    return {
        f"{verb} with {name}": (partial(_on, call, rows), f"^{argument} {pattern}")
        for verb, (argument, call) in verbs.items() for name, (rows, pattern) in bad.items()
    }


def _wide(width: int) -> np.ndarray:
    return np.ones((2, width), np.float32)


def _read_only() -> np.ndarray:
    rows = _fresh()
    rows.flags.writeable = False
    return rows


def _pull_twice(server: ParameterServer) -> None:
    handle = server.prepare_sample(3, 0, 1)
    keys = np.empty(3, np.int64)
    server.pull_sample(handle, keys, None)
    server.pull_sample(handle, keys, None)


def _pull_into(keys_out: np.ndarray, out: np.ndarray | None) -> Callable[[ParameterServer], None]:
    return lambda server: server.pull_sample(server.prepare_sample(3, 0, 1), keys_out, out)


REFUSALS: dict[str, Refusal] = {
    **_key_refusals(),
    **_value_refusals(),
    "pull into read-only memory": (lambda server: server.pull(KEYS, _read_only()), "^out should be writable"),
    "push without a rate": (lambda server: server.push(RULED, _wide(5)), "^the segment adagrad .* call set_rate"),
    "push of whole rows": (lambda server: server.push(RULED, _wide(10)), r"^values should have shape \(2, 5\)"),
    "set of weights alone": (lambda server: server.set(RULED, _wide(5)), r"^values should have shape \(2, 10\)"),
    "pull of whole rows": (lambda server: server.pull(RULED, _wide(10)), r"^out should have shape \(2, 5\)"),
    "whole rows of weights": (lambda server: server.pull_rows(RULED, _wide(5)), r"^out should have shape \(2, 10\)"),
    "rate of no segment": (lambda server: server.set_rate("none", 1.0), "^segment 'none' does not exist or has no "),
    "rate without a rule": (lambda server: server.set_rate("long", 1.0), "^segment 'long' does not exist or has no "),
    "rate below 0": (lambda server: server.set_rate("adagrad", -1.0), "^rate: -1.0 is not a finite number"),
    "rate not a number": (lambda server: server.set_rate("adagrad", float("nan")), "^rate: nan is not a finite number"),
    "set with a key twice": (lambda server: server.set(np.array([4, 4]), _fresh()), "^keys should be distinct"),
    "intent that ends early": (lambda server: server.intent(KEYS, 3, 3), r"^start, end: \[3, 3\) is not an interval"),
    "intent before the start": (lambda server: server.intent(KEYS, -1, 3), r"^start, end: \[-1, 3\)"),
    "too many samples": (lambda server: server.prepare_sample(401, 0, 1), "^count: cannot sample 401 of 400 rows"),
    "no samples": (lambda server: server.prepare_sample(0, 0, 1), "^count: cannot sample 0"),
    "samples that end early": (lambda server: server.prepare_sample(3, 2, 2), r"^start, end: \[2, 2\)"),
    "unknown handle": (lambda server: server.pull_sample(999, np.empty(3, np.int64), None), "^handle: sample 999 "),
    "used handle": (_pull_twice, "^handle: sample .* already been pulled"),
    "sample into too few keys": (_pull_into(np.empty(2, np.int64), None), r"^keys_out should be int64 of shape \(3,\)"),
    "sample into int32 keys": (_pull_into(np.empty(3, np.int32), None), r"^keys_out should be int64"),
    "sample into rows of another width": (
        _pull_into(np.empty(3, np.int64), np.empty((3, 5), np.float32)), r"^out should have shape \(3, 4\)",
    ),
}
# Preparing these calls takes a sample, which is counted.
_COUNT = [refusal for name, refusal in REFUSALS.items() if name == "used handle" or name.startswith("sample into")]


def check_refusal(server: ParameterServer, refusal: Refusal) -> None:
    """Check that the call is refused with the right message and is not counted.

    That it changes no row is checked after all refusals: see :func:`check_rows`.
    """
    call, pattern = refusal
    clock = server.clock
    stats = copy.deepcopy(_own_stats(server))
    error: Exception | None = None
    try:
        call(server)
    except Exception as caught:  # the assertion below reports any other type
        error = caught
    assert isinstance(error, ServerError), f"ServerError expected, not {error!r}"
    assert re.search(pattern, str(error)), f"{str(error)!r} does not match {pattern!r}"
    assert "\n" not in str(error)
    assert _own_stats(server) == stats or refusal in _COUNT, "the statistics count a refused call"
    assert server.clock == clock


def check_rows(server: ParameterServer) -> None:
    """Check that no refused call has changed a row: all remain 0."""
    for segment in server.layout.segments:
        out = np.empty((segment.num_rows, segment.row_width), np.float32)
        server.pull_rows(segment.keys(np.arange(segment.num_rows)), out)
        assert not out.any(), "rows changed"


def _own_stats(server: ParameterServer) -> ServerStats:
    """Return the statistics without those of the node, which other ranks change."""
    return dataclasses.replace(server.stats, node={})
