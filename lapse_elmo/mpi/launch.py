"""Run a program of ``bin/`` on every rank: join the world, report errors in one line, end the job with one status."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

from lapse_elmo.errors import UserError, log_line
from lapse_elmo.mpi.exit import abort, leave
from lapse_elmo.mpi.launcher import check_launcher, launcher_rank_and_size
from lapse_elmo.mpi.signals import FAILED, INTERRUPTED, USER_ERROR, StopSignals, catch_interrupts
from lapse_elmo.mpi.start import start_mpi
from lapse_elmo.mpi.stdio import check_output, open_standard_streams, unwritten_output
from lapse_elmo.mpi.world import World, solo

# An MPI call fails if the process at its other end has just ended with an error, whose message and status say more.
_CAUSE_FIRST_S = 2.0


def enter() -> World:
    """Initialise MPI and return the world.

    Raises:
        LaunchError: Where MPI cannot be used or does not fit the launcher (:func:`lapse_elmo.mpi.start.start_mpi`).
    """
    return World(start_mpi())


def launch(main: Callable[[list[str], Callable[[], World]], int | None], argv: list[str], prog: str) -> None:
    """Run ``main(argv, enter)`` and end the process, and the job, with the right status.

    A UserError becomes one line and status 2, any other exception a traceback and status 1. An error of one rank
    ends the whole job by an abort, since the other ranks may be waiting for this one.

    Args:
        main: A program. It parses ``argv`` first and then calls ``enter()`` to join the world, so that wrong options
            are reported without starting MPI. It may return an exit status, the same on every rank
            (``signals.py`` lists them).
        argv: The arguments of the program, without its name.
        prog: The name of the program in messages.
    """
    world: World | None = None

    def enter_once() -> World:
        nonlocal world
        world = enter()
        threading.excepthook = lambda hook: _fail(world, prog, hook.exc_value or RuntimeError("thread failed"))
        return world

    open_standard_streams()
    catch_interrupts()
    if launcher_rank_and_size()[0] and {"-h", "--help"} & set(argv):
        sys.exit(0)  # rank 0 prints it
    try:
        check_launcher()
        status = main(argv, enter_once)
        check_output()
        if status:
            leave(world or solo(), status)
    except SystemExit as stop:
        if world is None or world.size == 1:
            if problem := unwritten_output():  # the text of --help
                log_line(f"{prog}: error: cannot write the standard output: {problem}")
                stop.code = USER_ERROR
            raise
        why = stop.code if isinstance(stop.code, str) else f"sys.exit({stop.code})"
        log_line(f"{prog}: [{world}] left the job: {why}")
        abort(world, stop.code if isinstance(stop.code, int) and stop.code else FAILED)
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): end like a program that SIGPIPE has killed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        abort(world or solo(), 128 + signal.SIGPIPE)
    except BaseException as error:  # any exception: the other ranks must not wait for this one
        with StopSignals():  # one Ctrl-C may arrive twice, and must not interrupt the end
            _fail(world, prog, error)


def _fail(world: World | None, prog: str, error: BaseException) -> None:
    """Report ``error`` and end the process, and the job with it."""
    rank = world.rank if world else launcher_rank_and_size()[0]
    prefix = f"[{world}] " if world and world.size > 1 else ""
    if isinstance(error, UserError):
        everywhere = error.everywhere or world is None
        if not everywhere or rank == 0:  # an error of all ranks is reported by rank 0 alone
            log_line(f"{prog}: {'' if everywhere else prefix}error: {error}")
        if everywhere and world is None:
            # Before MPI there is no way to wait for rank 0, and some launchers kill the others at the first bad status.
            time.sleep(1.0 if rank else 0)
            sys.exit(USER_ERROR)
        if everywhere and world is not None:
            leave(world, USER_ERROR)
        status = USER_ERROR
    elif isinstance(error, KeyboardInterrupt):
        status = INTERRUPTED
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        # Also from threads of libraries: TensorBoard's meets a full disk first if the run's own files fit.
        log_line(f"{prog}: {prefix}error: cannot write {error.filename or 'a file'}: {error.strerror}; free some space")
        status = USER_ERROR
    elif type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU, whose memory is not checked before
        log_line(f"{prog}: {prefix}error: {str(error).splitlines()[0]}; lower --batch-size, or give --device cpu")
        status = USER_ERROR
    else:
        if world is not None and isinstance(error, sys.modules["mpi4py.MPI"].Exception):
            time.sleep(_CAUSE_FIRST_S)  # usually the launcher ends this process meanwhile
        text = "".join(traceback.format_exception(error))
        log_line("\n".join(prefix + line for line in text.splitlines()))
        status = FAILED
    abort(world or solo(), status)
