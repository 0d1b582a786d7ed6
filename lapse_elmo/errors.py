"""Every exception that lapse-elmo raises for something a user can mend.

The message of a :class:`UserError` is one line: what is wrong, what was found, what was expected, what to do next.
The programs in ``bin/`` print that line without a traceback and end with status 2. Anything else is a bug of ours and
keeps its traceback (status 1).
"""

from __future__ import annotations

import contextlib
import sys


class UserError(Exception):
    """A mistake, or a state of the machine, that the user can mend.

    ``everywhere`` is true when every rank is known to raise the same error at the same point (a wrong option, or a
    check made by one rank and agreed by all): such an error is printed once and the job ends in order. Any other ends
    the job by an abort that names the rank.
    """

    everywhere = False

    def on_every_rank(self) -> UserError:
        """This error, marked as one that every rank raises at this point."""
        self.everywhere = True
        return self


class ConfigError(UserError):
    """An option is unknown, malformed, out of range or contradicts another or the world size."""


class LaunchError(UserError):
    """The MPI launcher does not fit the MPI library, or the job's shape is not supported."""


class CorpusError(UserError):
    """A text, vocabulary or shard file is missing, damaged, foreign or does not fit the others."""


class OutputError(UserError):
    """An output exists already, or cannot be written (permissions, a full disk)."""


class CheckpointError(UserError):
    """A saved model is missing, incomplete, damaged or of another configuration."""


class ServerError(UserError):
    """A parameter server was called with keys or buffers that it must refuse, or out of turn."""


class TrainingError(UserError):
    """Training cannot go on, for instance because the loss is not finite."""


def in_one_line(error: object) -> str:
    """The first line of what ``error`` says; of an exception that says nothing, its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def log_line(text: str) -> None:
    """Lines on stderr, in one write: ``print`` makes two of them, between which a launcher puts other ranks' words."""
    with contextlib.suppress(OSError, ValueError):  # a full disk or a closed stream must not end what is reported on
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
