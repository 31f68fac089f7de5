"""Processes of a version whose model.py runs isolated: started, asked, ended, and started again.

A process is started by exec and shares nothing with the daemon but a socket, two regions of memory and a pipe for what
it prints. A thread looks after each: it writes what is printed to the log, and starts another process when this one has
ended. To the requests of the batch that it ran, its end is an error, and to others only a wait.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import logging
import math
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, TensorNextError, from_code
from tnxd.models.python.channel import OUT_OF_MEMORY, Answer, Ask, Failure, Loaded, Region, Reply, receive, send
from tnxd.models.python.failures import ProcessAway, ProcessFull, ProcessLost
from tnxd.models.python.instance import Plan
from tnxd.models.time_limits import TimeLimits

log = logging.getLogger(__name__)

# The first restart is at once, the next ones after twice as long each; a process that has run for some time begins
# anew.
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 10.0
_LONG_RUN_S = 10.0

# When to ask again while no process is there.
_RETRY_S = 0.2

# A process that is killed has ended by then, unless the kernel holds it.
_END_S = 5.0

_MOST_LINE = 16 * 1024

# As much as a pipe holds.
_MOST_PARTS = 64 * 1024 // _MOST_LINE

_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

_BEGIN = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from tnxd.models.python.child import main
main(sys.argv[2:])
"""
"""The program of a process. It finds what the daemon finds, and nothing in the directory that this was started in."""

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
"""Environment variables by which numerical libraries are told how many threads to use."""


@dataclass
class Restarts:
    """Restarts of the processes of a version. Attributes: count: in all. last: why, the last time, in words."""

    count: int = 0
    last: str = ""


class Worker:
    """A process that has been started.

    Attributes:
        defaults: as in `Loaded`, once `load` is done.
        ended: set when the process is gone; `why` says how then.
    """

    def __init__(self, plan: Plan, replicas: int) -> None:
        """Start it. The process ends with the thread that calls this."""
        self.plan = plan
        self.defaults: dict[str, bool] = {}
        self.ended = threading.Event()
        self.why = ""
        self._link, other = socket.socketpair()
        regions = Region.create(f"{plan.title} inputs"), Region.create(f"{plan.title} outputs")
        weakref.finalize(self, _close, self._link, *regions).atexit = False
        self._inputs, self._outputs = map(Region, regions)
        passed = (other.fileno(), *regions)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-c", _BEGIN, json.dumps(sys.path), *map(str, passed), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=passed,
                env=_environment(replicas),
                start_new_session=True,  # a signal from the terminal is for the daemon; what it starts is its group
            )
        self._pidfd = os.pidfd_open(self._process.pid)
        weakref.finalize(self, os.close, self._pidfd).atexit = False

    def load(self, limit_s: float) -> None:
        """Wait until the model is loaded.

        Raises:
            FailedPrecondition: it cannot be; the sentence names the file.
            ProcessLost: the process ended, or had no more time.
        """
        self._link.settimeout(None if limit_s == math.inf else limit_s)  # a plan may be larger than what it buffers
        self._send(self.plan)
        reply = self._receive(limit_s, "it was loaded")
        if isinstance(reply, Failure):
            raise FailedPrecondition(reply.text)
        assert isinstance(reply, Loaded)
        self.defaults = reply.defaults

    def ask(self, arrays: Sequence[Array | None], limit_s: float) -> list[Array]:
        """Run a batch. The outputs are copies.

        Raises:
            ProcessError: the process ended meanwhile, or had no more time or memory.
            Internal: the outputs are not what the signature promises.
            TensorNextError: the model raised one.
            Exception: whatever else the model raised, of a class of the same name.
        """
        self._send(Ask(self._inputs.write(arrays), self._inputs.size))
        reply = self._receive(limit_s, "a batch ran")
        if isinstance(reply, Failure):
            raise self._error(reply)
        assert isinstance(reply, Answer)
        self._outputs.map(reply.size)
        found = list(self._outputs.read(self.plan.outputs, reply.shapes))
        return [array.copy() for array in found if array is not None]

    def kill(self) -> None:
        """End the process."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def look_after(self) -> None:
        """Write what the process prints to the log until it has ended."""
        assert self._process.stdout is not None
        output = self._process.stdout
        os.set_blocking(output.fileno(), False)
        lines = _Lines(self.plan.title)
        poll = select.poll()
        poll.register(output, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        while self._pidfd not in (events := dict(poll.poll())):
            if output.fileno() in events and not lines.read(output.fileno()):
                poll.unregister(output)  # it has closed it
        with contextlib.suppress(ProcessLookupError):  # what it has started; before its number may be another's
            os.killpg(self._process.pid, signal.SIGKILL)
        for _ in range(_MOST_PARTS):  # no more: what has left its group may print on
            if not lines.read(output.fileno()):
                break
        lines.end()
        output.close()
        code = self._process.wait()
        self.why = self.why or self._end(code)
        self.ended.set()

    def _send(self, message: msgspec.Struct) -> None:
        with contextlib.suppress(OSError):  # it is gone, which `_receive` says
            send(self._link, message)

    def _receive(self, limit_s: float, what: str) -> Reply:
        try:
            return _replies.decode(receive(self._link, self._pidfd, limit_s))
        except TimeoutError:
            self.why = f"gave no answer for {limit_s:g} s and was ended"
            self.kill()
        except (EOFError, msgspec.DecodeError):
            self.kill()  # it has closed the socket, or is gone
        self.ended.wait(_END_S)
        raise ProcessLost(f"model {self.plan.name!r}: its process {self.why or 'ended'} while {what}")

    def _end(self, code: int) -> str:
        """The end of the process in words."""
        if code == OUT_OF_MEMORY:
            limit = self.plan.memory_limit_mb
            return f"ran out of its memory of {limit:g} MiB" if limit else "ran out of memory"
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"

    def _error(self, failure: Failure) -> BaseException:
        if failure.full:
            self.ended.wait(_END_S)
            return ProcessFull(f"model {self.plan.name!r}: its process {self.why or 'ends'} while a batch ran")
        if not failure.kind:
            return from_code(failure.code, failure.text)
        return _raised(failure)


class _Pool:
    """What the threads of the processes and their callers share.

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
        log.error("%s: its process %s: it is started again%s", plan.title, why, f" in {delay_s:g} s" * bool(delay_s))
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


class _Lines:
    """Lines that a process prints, on their way to the log."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._begun = b""

    def read(self, descriptor: int) -> bool:
        """Log what can be read. Returns whether there was anything."""
        with contextlib.suppress(BlockingIOError):
            part = os.read(descriptor, _MOST_LINE)
            self._add(part)
            return bool(part)
        return False

    def _add(self, part: bytes) -> None:
        """Log the lines that end within a part."""
        *lines, self._begun = (self._begun + part).split(b"\n")
        if len(self._begun) > _MOST_LINE:
            lines.append(self._begun)
            self._begun = b""
        for line in lines:
            log.info("%s: %s", self._title, line[:_MOST_LINE].decode("utf-8", "replace"))

    def end(self) -> None:
        """Log what is left."""
        if self._begun:
            self._add(b"\n")


def _raised(failure: Failure) -> BaseException:
    """An exception like that which the model raised: of the class of that name, if Python itself has it."""
    known = getattr(builtins, failure.kind, None)
    base = known if isinstance(known, type) and issubclass(known, Exception) else Exception
    kind = type(failure.kind, (base,), {"__str__": lambda _: failure.text, "__init__": lambda *_: None})
    error: BaseException = kind()
    return error


def _environment(replicas: int) -> dict[str, str]:
    """Environment of a process: libraries are to use its share of the cores."""
    share = str(max(len(os.sched_getaffinity(0)) // replicas, 1))
    return {**dict.fromkeys(_THREADS, share), **os.environ}


def _close(link: socket.socket, *descriptors: int) -> None:
    link.close()
    for descriptor in descriptors:
        os.close(descriptor)
