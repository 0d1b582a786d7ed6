"""Check the values of options, with messages that name the option as the user writes it."""

from __future__ import annotations

import math

from lapse_elmo.errors import ConfigError


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Check an option.

    Args:
        condition: Whether the value is valid.
        name: The field's name; the message names the option ``--name``.
        value: The value given.
        expected: What was expected instead, in words.

    Raises:
        ConfigError: ``condition`` is false.
    """
    if not condition:
        raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


def positive(group: object, *names: str) -> None:
    """Check that the options ``names`` of ``group`` are finite numbers above 0.

    Raises:
        ConfigError: One of them is not.
    """
    for name in names:
        value = getattr(group, name)
        require(0 < value < math.inf, name, value, "a number above 0")


def fraction(group: object, *names: str) -> None:
    """Check that the options ``names`` of ``group`` are numbers in [0, 1).

    Raises:
        ConfigError: One of them is not.
    """
    for name in names:
        value = getattr(group, name)
        require(0 <= value < 1, name, value, "a number in [0, 1)")
