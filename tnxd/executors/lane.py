"""A lane: one thread with one runner, and the queue of its jobs."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from tnxctl.protocol.errors import Internal, Unavailable
from tnxd.error_text import first_line, sentence
from tnxd.events import event, speaker
from tnxd.executors.execution import Execution
from tnxd.executors.runner import Runner

OnDone = Callable[[Execution], None]

log = logging.getLogger(__name__)

T = TypeVar("T")

TURN_S = 5.0
"""So long a model that is being loaded waits for its turn on a lane that serves, which may hang."""

# The lowest priority that Linux has for a thread (setpriority(2)).
_NICEST = 19


class Job:
    """A function that a lane's thread is to call with its runner.

    Attributes:
        done: its result, or what it raised. begun: set when its turn has come. withdrawn: nobody waits for it.
    """

    def __init__(self, function: Callable[[Runner], Any]) -> None:
        self._function = function
        self._speaker = speaker.model
        self.done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.begun = threading.Event()
        self.withdrawn = False

    def run(self, runner: Runner, broken: str) -> None:
        self.begun.set()
        speaker.model = self._speaker
        try:
            if self.withdrawn:
                return
            if broken:
                raise Unavailable(broken)
            result = self._function(runner)
            runner.settle()
            self.done.put((result, None))
        except BaseException as error:  # a model's code may raise anything, SystemExit too
            self.done.put((None, error))


Inbox = queue.SimpleQueue[Execution | str | Job | None]
"""Executions to run, keys of models to forget, and functions to call; None: see what else there is."""

Work = Callable[[Any, Inbox, OnDone, bool, bool], None]
"""Work of a lane's thread, given its runner, its inbox, and what `Lane` is given."""


class Lane:
    """A thread that runs jobs and batches one after the other, with a runner of its own.

    A device that cannot be used on the thread breaks the lane: each execution is answered with the reason then.

    Args:
        name: of the thread.
        on_done: called on the thread with every execution that is over.
        yields: whether the operating system is to let the thread run last, where it can. idles: whether it is to let
            the thread, and the team that comes with it, run only where nothing else wants a core (SCHED_IDLE).
        work: of the thread; None: `work`.

    Attributes:
        runner: used by the thread alone, but for its `calls`.
        submit: hands an execution over; any thread may call it.
    """

    def __init__(
        self,
        name: str,
        runner: Runner,
        on_done: OnDone,
        *,
        yields: bool = False,
        idles: bool = False,
        work: Work | None = None,
    ) -> None:
        self.runner = runner
        self._inbox: Inbox = queue.SimpleQueue()
        self.submit: Callable[[Execution], None] = self._inbox.put
        # Daemon threads: a model that hangs must not keep the process from ending.
        arguments = (runner, self._inbox, on_done, yields, idles)
        threading.Thread(target=work or _work, args=arguments, name=name, daemon=True).start()

    def forget(self, key: str) -> None:
        """Have the thread free what its runner keeps for the next batch of the model of that key."""
        self._inbox.put(key)

    def call(self, function: Callable[[Runner], T], within_s: float | None = None) -> T:
        """Have the thread call a function with its runner, and wait for the result.

        Args:
            within_s: how long to wait for the lane's turn; None: as long as it takes.

        Raises:
            Unavailable: the lane is broken, or was busy for so long.
            BaseException: whatever the function raised.
        """
        job = Job(function)
        self._inbox.put(job)
        if not job.begun.wait(within_s):
            job.withdrawn = True
            raise Unavailable(f"the lane has been busy for {within_s:g} s")
        result, error = job.done.get()
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]


def prepare_thread(runner: Runner, *, yields: bool, idles: bool) -> str:
    """Prepare the calling thread for its runner. Returns why it is of no use, in words; "": it is."""
    if yields:
        with contextlib.suppress(OSError, AttributeError):  # where threads have no priorities of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICEST)
    if idles:
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    try:
        runner.enter_thread()
    except BaseException as error:  # the device is gone: answer for it rather than leave callers waiting
        return sentence(error)
    return ""


def answer_defect(execution: Execution, error: BaseException) -> None:
    """Answer an execution that a defect of ours has ended. Within an except block."""
    name = threading.current_thread().name
    log.exception("lane %s", name, extra=event("defect", execution.model.key, thread=name))
    execution.outcomes = [Internal(f"the executor failed: {first_line(error)}") for _ in execution.items]


def _work(runner: Runner, inbox: Inbox, on_done: OnDone, yields: bool, idles: bool) -> None:
    broken = prepare_thread(runner, yields=yields, idles=idles)
    while True:
        task = inbox.get()
        if isinstance(task, str):
            runner.forget(task)
            continue
        if isinstance(task, Job):
            task.run(runner, broken)
            del task
            continue
        assert task is not None
        task.fatal = broken
        try:
            runner.run(task)
        except BaseException as error:  # this request must be answered, and the lane go on
            answer_defect(task, error)
        on_done(task)
        del task  # hold no request's memory while waiting for the next
