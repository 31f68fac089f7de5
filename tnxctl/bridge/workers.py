"""Workers of the bridge: processes that share its address, and are started again when they die.

A worker reads its settings from standard input, says on standard output that it serves, and ends in good order at the
end of its input: so none outlives the process that has started it. That process holds the listening sockets, so whoever
connects while a worker is started again waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence

import msgspec

from tnxctl.bridge import logs, server
from tnxctl.bridge.notifying import notify
from tnxctl.bridge.settings import Settings
from tnxctl.protocol.errors import TensorNextError

_READY = b"ready\n"

_FIRST_WAIT_S = 0.1
_LAST_WAIT_S = 5.0
_SOUND_S = 30.0
"""Seconds after which a worker that dies is the first one to, once more."""

_GRACE_S = 5.0
"""Seconds that workers get to end beside those that their requests get."""

_log = logging.getLogger("tnxctl.bridge")


class _Order(msgspec.Struct, frozen=True):
    """Task of a worker. Attributes: descriptors: of its listening sockets."""

    settings: Settings
    descriptors: tuple[int, ...]


def run(settings: Settings, sockets: Sequence[socket.socket], on_ready: Callable[[], None]) -> int:
    """Serve by several workers until SIGTERM or SIGINT. Returns the exit code.

    Args:
        sockets: one for each worker, or one for all.
        on_ready: called once all of them serve.
    """
    return asyncio.run(_Workers(settings, sockets, on_ready).run())


class _Workers:
    """The workers of a bridge."""

    def __init__(self, settings: Settings, sockets: Sequence[socket.socket], on_ready: Callable[[], None]) -> None:
        self._settings = settings
        self._sockets = sockets
        self._on_ready = on_ready
        self._unready = settings.workers
        self._processes: dict[int, Process] = {}
        self._serving: set[int] = set()  # process ids of those that react to SIGHUP, which would end any other
        self._reloads = 0
        self._stopping = asyncio.Event()
        self._code = 0

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        places = range(self._settings.workers)
        keepers = [loop.create_task(self._keep(self._sockets[place % len(self._sockets)])) for place in places]
        await self._stopping.wait()
        _, late = await asyncio.wait(keepers, timeout=self._settings.limits.drain_timeout_s + _GRACE_S)
        if late:
            self._signal(signal.SIGKILL)
        await asyncio.gather(*keepers)
        return self._code

    async def _keep(self, listening: socket.socket) -> None:
        """Keep one worker running."""
        loop = asyncio.get_running_loop()
        wait_s = _FIRST_WAIT_S
        first = True
        while not self._stopping.is_set():
            reloads = self._reloads
            process = await self._start(listening)
            began = loop.time()
            assert process.stdout is not None
            if await process.stdout.readline() == _READY:
                self._serving.add(process.pid)
                if reloads != self._reloads:  # nobody knows which state of the files it has read
                    _send(process, signal.SIGHUP)
                if first:
                    first = False
                    self._unready -= 1
                    if not self._unready:
                        self._on_ready()
            code = await process.wait()
            del self._processes[process.pid]
            self._serving.discard(process.pid)
            if self._stopping.is_set():
                return
            if first:  # it has said why; all others would say the same
                self._code = code if code > 0 else 1
                self._stop()
                return
            wait_s = _FIRST_WAIT_S if loop.time() - began > _SOUND_S else min(2 * wait_s, _LAST_WAIT_S)
            _log.error("worker %s ended with %s, and is started again in %g s", process.pid, _in_words(code), wait_s)
            try:
                await asyncio.wait_for(self._stopping.wait(), wait_s)
            except TimeoutError:
                continue

    async def _start(self, listening: socket.socket) -> Process:
        descriptor = listening.fileno()
        surroundings = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__),
            stdin=PIPE,
            stdout=PIPE,
            pass_fds=(descriptor,),
            env=surroundings,
            start_new_session=True,  # an interrupt from the terminal comes from here: a second one lets nothing finish
        )
        self._processes[process.pid] = process
        if self._stopping.is_set():  # too late for the signal that all others got
            _send(process, signal.SIGTERM)
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(_Order(self._settings, (descriptor,))) + b"\n")
        return process

    def _reload(self) -> None:
        """Have all workers read their files again; those that do not serve yet, once they do."""
        self._reloads += 1
        for pid in self._serving:
            _send(self._processes[pid], signal.SIGHUP)

    def _stop(self) -> None:
        notify("STOPPING=1")
        self._stopping.set()
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for process in self._processes.values():
            _send(process, number)


def _send(process: Process, number: int) -> None:
    """Signal a process, unless it has ended."""
    if process.returncode is None:
        process.send_signal(number)


def _in_words(code: int) -> str:
    try:
        return f"code {code}" if code >= 0 else signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _work() -> None:
    """Be a worker."""
    logs.install()
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=_Order)
    sockets = [socket.socket(fileno=descriptor) for descriptor in order.descriptors]
    try:
        server.run(order.settings, sockets, lambda: print(_READY.decode(), end="", flush=True), sys.stdin.fileno())
    except TensorNextError as error:
        _log.error("%s", error.message)
        sys.exit(1)


if __name__ == "__main__":
    _work()
