"""Helper of a worker: a process beside it that reads and writes long JSON, and reads typed contents of gRPC.

They would keep the worker's loop: 16 MiB of JSON keep an interpreter for seconds if they are many short values, and no
thread helps, since it is one call that holds the interpreter's lock. A helper is started when the first such document
comes, and ended when none has come for a while, so that what its memory has grown to is given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import pickle
import signal
import struct
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from typing import Any, BinaryIO, ParamSpec, TypeVar

from tnxctl.bridge.http import HttpError
from tnxctl.protocol.errors import TensorNextError, Unavailable

P = ParamSpec("P")
T = TypeVar("T")

LONG_BYTES = 64 * 1024
"""Length from which on a document is read by the helper: up to there it takes 10 ms at worst, and 1 ms over gRPC."""

LONG_ELEMENTS = 16 * 1024
"""Elements of an output from which on it is written by the helper: up to there that takes 2 ms."""

_IDLE_S = 30.0

_LENGTH = struct.Struct("=Q")

_log = logging.getLogger("tnxctl.bridge")


class Helper:
    """Helper of one worker, as its event loop sees it. It does one thing at a time."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._free = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Result of a function of a module, called there. Whoever is cancelled meanwhile ends the process with it.

        Raises:
            Unavailable: the process has died under it, as it does where memory is short.
            HttpError, TensorNextError: the function has.
        """
        order = pickle.dumps((function, args, kwargs), pickle.HIGHEST_PROTOCOL)
        async with self._free:
            if self._idle is not None:
                self._idle.cancel()
                self._idle = None
            try:
                is_error, outcome = await self._exchange(order)
            except (OSError, asyncio.IncompleteReadError, RuntimeError):  # the last one is uvloop's for a closed pipe
                self._kill()
                _log.error("the process that reads and writes long documents has died")  # the next one starts another
                raise Unavailable("the process that was to read or write this has died", retry_after_s=1.0) from None
            except BaseException:
                self._kill()
                raise
            self._idle = asyncio.get_running_loop().call_later(_IDLE_S, self._kill)
        if is_error:
            raise outcome
        return outcome  # type: ignore[no-any-return]

    async def close(self) -> None:
        """End the process."""
        if self._idle is not None:
            self._idle.cancel()
        process = self._process
        self._kill()
        if process is not None:
            await process.wait()

    async def _exchange(self, order: bytes) -> tuple[bool, Any]:
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", __name__),
                stdin=PIPE,
                stdout=PIPE,
                start_new_session=True,  # it ends with its worker, and by no signal before that
            )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(_LENGTH.pack(len(order)))
        process.stdin.write(order)
        await process.stdin.drain()
        (length,) = _LENGTH.unpack(await process.stdout.readexactly(_LENGTH.size))
        return pickle.loads(await process.stdout.readexactly(length))  # type: ignore[no-any-return]

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):  # it is dead already
                process.kill()


def main() -> None:
    """Do what comes on standard input, until its end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    gc.disable()  # it would look through millions of lists again and again, and JSON has no cycles
    orders = sys.stdin.buffer
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as outcomes:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        while head := orders.read(_LENGTH.size):
            _do(orders.read(*_LENGTH.unpack(head)), outcomes)


def _do(order: bytes, outcomes: BinaryIO) -> None:
    function, args, kwargs = pickle.loads(order)
    outcome: tuple[bool, Any]
    try:
        outcome = False, function(*args, **kwargs)
    except (HttpError, TensorNextError) as error:
        outcome = True, error
    sent = pickle.dumps(outcome, pickle.HIGHEST_PROTOCOL)
    outcomes.write(_LENGTH.pack(len(sent)) + sent)
    outcomes.flush()


if __name__ == "__main__":
    main()
