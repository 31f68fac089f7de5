"""Processes of a version whose model.py runs isolated: as many as it has replicas, and started again when they end.

A thread looks after each: it writes what is printed to the log, and starts another process when this one has ended.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxd.events import event
from tnxd.models.python.failures import ProcessAway
from tnxd.models.python.instance import Plan
from tnxd.models.python.process import Worker
from tnxd.models.time_limits import TimeLimits

log = logging.getLogger(__name__)

# The first restart is at once, the next ones after twice as long each; a process that has run for some time begins
# anew.
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 10.0
_LONG_RUN_S = 10.0

# When to ask again while no process is there.
_RETRY_S = 0.2


@dataclass
class Restarts:
    """Restarts of the processes of a version. Attributes: count: in all. last: why, the last time, in words."""

    count: int = 0
    last: str = ""


class _Pool:
    """State that the threads of the processes and their callers share.

    Attributes:
        changed: held while the rest is looked at. stopped: whether all processes are to end.
        started: processes that have not ended. loaded: of these, those that can be asked. idle: of these, those that
            nobody asks.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.started: set[Worker] = set()
        self.loaded: set[Worker] = set()
        self.idle: list[Worker] = []
        self.stopped = False

    def stop(self) -> None:
        """End all processes, for good."""
        with self.changed:
            self.stopped = True
            workers = list(self.started)
            self.changed.notify_all()
        for worker in workers:
            worker.kill()

    def take(self, name: str, limit_s: float) -> Worker:
        """A process that nobody asks. Raises ProcessAway: there is none."""
        until = time.monotonic() + limit_s
        with self.changed:
            while not self.idle:
                left = until - time.monotonic()
                if not self.loaded or left <= 0:
                    raise ProcessAway(f"model {name!r}: its process is being started again", retry_after_s=_RETRY_S)
                self.changed.wait(min(left, threading.TIMEOUT_MAX))
            return self.idle.pop(0)

    def give_back(self, worker: Worker) -> None:
        """A process has been asked, and may be asked again unless it is gone."""
        with self.changed:
            if worker in self.loaded:
                self.idle.append(worker)
                self.changed.notify()

    def has_started(self, worker: Worker) -> None:
        """A process has been started."""
        with self.changed:
            self.started.add(worker)
            stopped = self.stopped
        if stopped:
            worker.kill()

    def has_loaded(self, worker: Worker) -> None:
        """A process can be asked."""
        with self.changed:
            if worker in self.started:
                self.loaded.add(worker)
                self.idle.append(worker)
                self.changed.notify()

    def has_ended(self, worker: Worker) -> None:
        """A process is gone."""
        with self.changed:
            self.started.discard(worker)
            self.loaded.discard(worker)
            self.idle = [other for other in self.idle if other is not worker]
            self.changed.notify_all()


class Processes:
    """The processes of one version. They end with this object.

    Args:
        replicas: how many. restarts: counts how often one was started again.

    Attributes:
        defaults: as in `tnxd.models.python.channel.Loaded`.

    Raises:
        FailedPrecondition: the model cannot be loaded; the sentence names the file.
    """

    def __init__(self, plan: Plan, replicas: int, limits: TimeLimits, restarts: Restarts) -> None:
        self._name = plan.name
        self._limits = limits
        self._pool = _Pool()
        weakref.finalize(self, self._pool.stop)
        work = partial(_keep_one, self._pool, plan, replicas, limits, restarts)
        self.defaults = self._start(work, 1)  # one alone: what is wrong is wrong with all
        self._start(work, replicas - 1)

    def __call__(self, arrays: Sequence[Array | None]) -> list[Array]:
        """Run a batch on one of them. Raises as `Worker.ask`, and ProcessAway: there is none now."""
        worker = self._pool.take(self._name, self._limits.batch_s)
        try:
            return worker.ask(arrays, self._limits.batch_s)
        finally:
            self._pool.give_back(worker)

    def _start(self, work: Callable[[_Results], None], count: int) -> dict[str, bool]:
        """Start processes, and wait for them. Returns the defaults that the last one has told."""
        results: _Results = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=work, args=(results,), name="process", daemon=True).start()
        defaults: dict[str, bool] = {}
        for _ in range(count):
            result = results.get()
            if isinstance(result, TensorNextError):
                self._pool.stop()
                raise FailedPrecondition(result.message)
            defaults = result
        return defaults


_Results = queue.SimpleQueue[dict[str, bool] | TensorNextError]
"""Of each first start: the defaults that the process has told, or why it failed."""


def _keep_one(
    pool: _Pool, plan: Plan, replicas: int, limits: TimeLimits, restarts: Restarts, results: _Results
) -> None:
    """Start a process, and another one each time that it has ended, until the pool is stopped. The work of a thread."""
    delay_s = 0.0
    first = True
    while True:
        began = time.monotonic()
        loaded, why = _run(pool, plan, replicas, limits, results if first else None)
        if pool.stopped or (first and not loaded):
            return
        first = False
        if time.monotonic() - began > _LONG_RUN_S:
            delay_s = 0.0
        restarts.count += 1
        restarts.last = why
        log.error(
            "%s: its process %s: it is started again%s",
            *(plan.title, why, f" in {delay_s:g} s" * bool(delay_s)),
            extra=event("process_restarted", plan.title, reason=why, count=restarts.count, seconds=delay_s),
        )
        with pool.changed:
            pool.changed.wait_for(lambda: pool.stopped, delay_s)
        if pool.stopped:
            return
        delay_s = min(2 * delay_s or _FIRST_DELAY_S, _LONGEST_DELAY_S)


def _run(pool: _Pool, plan: Plan, replicas: int, limits: TimeLimits, results: _Results | None) -> tuple[bool, str]:
    """Run one process, from its start to its end. Returns whether it has loaded its model, and how it ended."""
    try:
        worker = Worker(plan, replicas)
    except OSError as error:  # no process, descriptor or memory is left
        if results is not None:
            results.put(FailedPrecondition(f"no process can be started: {error}"))
        return False, f"cannot be started: {error}"
    pool.has_started(worker)
    failures: list[TensorNextError] = []

    def load() -> None:
        """Wait for the model beside the thread that reads what the process prints."""
        try:
            worker.load(limits.load_s)
        except TensorNextError as error:
            failures.append(error)
            worker.kill()
            if results is not None:
                results.put(error)
        else:
            pool.has_loaded(worker)
            if results is not None:
                results.put(worker.defaults)

    loading = threading.Thread(target=load, name="process", daemon=True)
    loading.start()
    worker.look_after()
    pool.has_ended(worker)
    loading.join()
    return not failures, failures[0].message if failures else worker.why
