"""The exceptions that lapse-elmo raises for mistakes that a user can correct, and lines on stderr.

The message of a :class:`UserError` is one line: what is wrong, what was found, what was expected, what to do next.
The programs in ``bin/`` print that line without a traceback and exit with status 2. Any other exception is a bug and is
printed with its traceback (status 1).
"""

from __future__ import annotations

import contextlib
import sys

from lapse_elmo.program import as_called


class UserError(Exception):
    """A mistake, or a state of the machine, that the user can correct.

    Attributes:
        everywhere: Whether every rank is known to raise the same error at the same point (a wrong option, or a check
            made by one rank whose result was broadcast). Such an error is printed once and the job ends in order. Any
            other error ends the job by an abort, and its message names the rank.
    """

    everywhere = False

    def on_every_rank(self) -> UserError:
        """Return this error, marked as one that every rank raises at this point."""
        self.everywhere = True
        return self


class ConfigError(UserError):
    """An option is unknown, malformed, out of range or contradicts another or the world size."""


class LaunchError(UserError):
    """The MPI launcher does not fit the MPI library, or the job's shape is not supported."""


class CorpusError(UserError):
    """A text, vocabulary or shard file is missing, damaged, of another format, or does not fit the others."""


class OutputError(UserError):
    """An output exists already, or cannot be written (no permission, a full disk)."""


class CheckpointError(UserError):
    """A saved model is missing, incomplete, damaged, or was trained with another configuration."""


class UnreadableError(CheckpointError):
    """A file of a saved model cannot be read now. It may be intact, so nothing must be discarded because of this."""


class ServerError(UserError):
    """A parameter server was called with invalid keys or buffers, or in the wrong order."""


class TrainingError(UserError):
    """Training cannot continue, for instance because the loss is not finite."""


def in_one_line(error: object) -> str:
    """Return the first line of the message, or the class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def log_line(text: str) -> None:
    """Write ``text`` and a line break to stderr in one call.

    ``print`` issues two writes, which a launcher may interleave with other ranks' output.
    """
    with contextlib.suppress(OSError, ValueError):  # a full disk or a closed stream must not end the program
        sys.stderr.write(f"{as_called(text)}\n")
        sys.stderr.flush()
