"""Exit codes: what a script learns from `$?`. The table in `tnxctl --help` is made from this one."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from tnxctl.cli.interrupts import Terminated
from tnxctl.protocol import errors


class Exit(IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2  # click's own code for it
    UNREACHABLE = 3
    NOT_READY = 4
    REFUSED = 5
    TIMEOUT = 6
    FILE = 7
    OVERLOADED = 8
    DEGRADED = 9
    INTERRUPTED = 130  # what a shell reports for SIGINT
    TERMINATED = 143  # and for SIGTERM


MEANINGS: dict[Exit, str] = {
    Exit.OK: "all went well; for health: the daemon is ready, and no model has failed",
    Exit.FAILED: "some of several requests or models failed, or an internal error",
    Exit.USAGE: "wrong use of the command line",
    Exit.UNREACHABLE: "no daemon answers there, or it takes no more requests",
    Exit.NOT_READY: "the daemon is not ready (health), or the model is not loaded",
    Exit.REFUSED: "the request cannot work as it is (shape, no such model, not allowed)",
    Exit.TIMEOUT: "no answer within --timeout or before --deadline",
    Exit.FILE: "a file cannot be read or written, or standard output cannot",
    Exit.OVERLOADED: "the daemon's queue or memory is full: try again later",
    Exit.DEGRADED: "the daemon is ready, but models of its have failed (health)",
    Exit.INTERRUPTED: "interrupted (Ctrl-C)",
    Exit.TERMINATED: "terminated (SIGTERM)",
}

_BY_ERROR: dict[type[errors.TensorNextError], Exit] = {
    errors.InvalidArgument: Exit.REFUSED,
    errors.NotFound: Exit.REFUSED,
    errors.AlreadyExists: Exit.REFUSED,
    errors.PermissionDenied: Exit.REFUSED,
    errors.Unauthenticated: Exit.REFUSED,
    errors.Unimplemented: Exit.REFUSED,
    errors.FailedPrecondition: Exit.NOT_READY,
    errors.Unavailable: Exit.UNREACHABLE,
    errors.DeadlineExceeded: Exit.TIMEOUT,
    errors.ResourceExhausted: Exit.OVERLOADED,
}


class FileProblem(Exception):
    """A file of the user's cannot be read or written; the message is one sentence that names it."""


def of_error(error: errors.TensorNextError | FileProblem) -> Exit:
    """The exit code for one error that ended the command."""
    if isinstance(error, FileProblem):
        return Exit.FILE
    return _BY_ERROR.get(type(error), Exit.FAILED)


def of_interrupt(interrupt: KeyboardInterrupt) -> Exit:
    """The exit code after Ctrl-C or SIGTERM."""
    return Exit.TERMINATED if isinstance(interrupt, Terminated) else Exit.INTERRUPTED


def of_run(answered: int, failures: Iterable[errors.TensorNextError]) -> Exit:
    """The exit code after several requests: that of the failures if nothing else happened, FAILED for a mixture."""
    codes = {of_error(error) for error in failures}
    if not codes:
        return Exit.OK
    return codes.pop() if len(codes) == 1 and not answered else Exit.FAILED
