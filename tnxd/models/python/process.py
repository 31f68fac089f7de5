"""A process whose model.py runs isolated: started, asked, looked after until it ends.

It is started by exec and shares nothing with the daemon but a socket, two regions of memory and a pipe for what it
prints. To the requests of the batch that it ran, its end is an error, and to others only a wait.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence

import msgspec

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, from_code
from tnxd.models.python.channel import (
    CUT_OFF,
    OUT_OF_MEMORY,
    Answer,
    Ask,
    Failure,
    Loaded,
    Region,
    Reply,
    receive,
    send,
)
from tnxd.models.python.failures import ProcessFull, ProcessLost
from tnxd.models.python.instance import Plan
from tnxd.models.python.printed_lines import MOST_LINE, PrintedLines
from tnxd.models.time_limits import PROCESS_END_S

# As much as a pipe holds.
_MOST_PARTS = 64 * 1024 // MOST_LINE

# A process that ends closes its connection before it is gone, so much earlier at most.
_END_S = 1.0

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
        lines = PrintedLines(self.plan.title)
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
            if not _is_readable(self._pidfd, _END_S):
                self.why = "closed its connection to the daemon, and was ended"
                self.kill()
        self.ended.wait(PROCESS_END_S)
        raise ProcessLost(f"model {self.plan.name!r}: its process {self.why or 'ended'} while {what}")

    def _end(self, code: int) -> str:
        """The end of the process in words."""
        if code == OUT_OF_MEMORY:
            limit = self.plan.memory_limit_mb
            return f"ran out of its memory of {limit:g} MiB" if limit else "ran out of memory"
        if code == CUT_OFF:
            return "closed its connection to the daemon"
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"

    def _error(self, failure: Failure) -> BaseException:
        if failure.full:
            self.ended.wait(PROCESS_END_S)
            return ProcessFull(f"model {self.plan.name!r}: its process {self.why or 'ends'} while a batch ran")
        if not failure.kind:
            return from_code(failure.code, failure.text)
        return _raised(failure)


def _raised(failure: Failure) -> BaseException:
    """An exception like that which the model raised: of the class of that name, if Python itself has it."""
    known = getattr(builtins, failure.kind, None)
    base = known if isinstance(known, type) and issubclass(known, Exception) else Exception
    if issubclass(base, ExceptionGroup):
        base = Exception  # it would have to have others in it
    kind = type(failure.kind, (base,), {"__str__": lambda _: failure.text, "__init__": lambda *_: None})
    error: BaseException = kind()
    return error


def _is_readable(descriptor: int, limit_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(limit_s * 1e3))


def _environment(replicas: int) -> dict[str, str]:
    """Environment of a process: libraries are to use its share of the cores."""
    share = str(max(len(os.sched_getaffinity(0)) // replicas, 1))
    return {**dict.fromkeys(_THREADS, share), **os.environ}


def _close(link: socket.socket, *descriptors: int) -> None:
    link.close()
    for descriptor in descriptors:
        os.close(descriptor)
