"""What a program prints: written in full, or an error."""

from __future__ import annotations

from lapse_elmo.errors import OutputError
from lapse_elmo.streams import unwritten_output


def check_output() -> None:
    """Flush what was printed. :raises OutputError: if it cannot be written, to a full disk for instance."""
    if problem := unwritten_output():
        raise OutputError(f"cannot write the standard output: {problem}; send it elsewhere")
