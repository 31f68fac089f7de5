"""Forks and the exit of this process: its drivers are told of both.

After a fork, threads, locks and connections of a client are its parent's. At exit, threads go on while the interpreter
ends, and pyzmq refuses to send large frames then.
"""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Protocol

import zmq.utils.garbage  # noqa: F401 - before the registration at the end of this file

from tnxctl.protocol.errors import FailedPrecondition

forks = 0
"""Number of forks behind this process, as far as clients have to know: a client that was made at another one is
another process's."""

exiting = False
"""Whether the interpreter ends: callbacks would run in one that is half gone."""


class Driver(Protocol):
    """Driver of the calls of a client, in threads of its own."""

    def after_fork(self) -> None:
        """Called in a child process, before anything else there."""

    def at_exit(self) -> None:
        """Called once the interpreter ends."""


_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()


def register(driver: Driver) -> None:
    """Have a driver told of forks and of the exit, as long as it lives."""
    _drivers.add(driver)


def fork_error(endpoint: str) -> FailedPrecondition:
    """The error of a client that a fork has copied."""
    return FailedPrecondition(
        f"the client of {endpoint} is another process's, and came here by a fork: make a new one after the fork"
    )


def _after_fork() -> None:
    global forks
    forks += 1
    for driver in list(_drivers):
        driver.after_fork()


def _at_exit() -> None:
    global exiting
    exiting = True
    for driver in list(_drivers):
        driver.at_exit()


if hasattr(os, "register_at_fork"):  # where there is fork
    os.register_at_fork(after_in_child=_after_fork)

# Functions registered later run earlier: this one comes before pyzmq's own.
atexit.register(_at_exit)
