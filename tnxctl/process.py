"""Forks and the exit of this process: its drivers are told of both.

After a fork, threads, locks and connections of a client are its parent's. At exit, threads go on while the interpreter
ends, and pyzmq refuses to send large frames then. No other process can get a client at all: it is not pickled.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Protocol

import zmq.utils.garbage  # noqa: F401 - before the registration at the end of this file

from tnxctl.protocol.errors import FailedPrecondition

forks = 0
"""Number of forks behind this process, as far as clients have to know: a client that was made at another one is
another process's."""

exiting = False
"""Whether the interpreter ends: callbacks would run in one that is half gone."""


class Driver(Protocol):
    """Driver of the calls of a client."""

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


def fail_copied(future: Future[Any], error: FailedPrecondition) -> None:
    """Fail a future that a fork has copied, so that nobody in the child waits for it in vain.

    Its lock may be held by a thread that the child does not have. Its callbacks and whoever waits are the parent's.
    """
    future._condition = threading.Condition()
    future._waiters = []
    future._done_callbacks = []  # type: ignore[attr-defined]  # there since Python 3.2
    with suppress(InvalidStateError):  # it is done, or cancelled
        future.set_exception(error)


def pickle_error(client: object, arguments: str) -> TypeError:
    """The error of whoever pickles or copies a client: the one that Python expects of what cannot be pickled.

    Args:
        arguments: those that make such a client.
    """
    name = type(client).__name__
    return TypeError(
        f"a tnxctl.{name} holds a connection of this process, and cannot be pickled or copied: pass on the address, "
        f"and make a client where it is used, {name}({arguments})"
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
