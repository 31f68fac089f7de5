"""The client for asyncio: the same session, driven by the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from tnxctl import process
from tnxctl.balancer import Balancer, session_of
from tnxctl.busypoll import BusyPoll, check_busy_poll
from tnxctl.call import Call
from tnxctl.channels.channel import POLLIN, POLLOUT, Watcher
from tnxctl.driver import ThreadDriver
from tnxctl.durations import spell
from tnxctl.encoder import DEFAULT_TIMEOUT_S
from tnxctl.endpoint import DEFAULT_ENDPOINT
from tnxctl.keys import lookup
from tnxctl.link import Link
from tnxctl.links import link_of, sharing_of
from tnxctl.protocol.errors import FailedPrecondition
from tnxctl.protocol.wire import (
    ClientsReport,
    Comparison,
    HealthReport,
    Identity,
    KeysReport,
    Limits,
    ModelInfo,
    RecordingReport,
    ReloadReport,
    SlowRequest,
    StatsReport,
)
from tnxctl.results import Result, Traffic
from tnxctl.session import Session
from tnxctl.tracing import traceparent_of

if TYPE_CHECKING:
    from tnxctl.protocol.datatypes import Array
else:
    Array = Any  # see `tnxctl.results`

T = TypeVar("T")

_REPLIES_PER_TURN = 64  # then other tasks get the loop
_MAX_WAIT_S = 86_400.0
_GRACE_S = 0.5  # for a loop in another thread, when the interpreter ends


class AsyncClient:
    """`tnxctl.Client` with `await`: same arguments, results and errors.

        async with AsyncClient("192.168.1.100") as tnx:
            results = await asyncio.gather(*(tnx.predict(x) for x in batches))

    It belongs to the event loop of its first call, and is used from that loop's thread only. Cancelling a task
    cancels its prediction. The arrays of a call must stay unchanged until it is done.

    Args:
        busy_poll: seconds for which the loop looks for what comes next without sleeping, at most, while there is one
            call at a time and each has been short; from 0 (never) to 1. It is there sooner so, and a core has no rest.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str] = DEFAULT_ENDPOINT,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        limits: Limits | None = None,
        hedge: bool | float = False,
        key: str | os.PathLike[str] | None = None,
        server_key: str | None = None,
        shared_memory: bool = False,
        busy_poll: float = 0.0,
    ) -> None:
        self._given = endpoint
        self._busy_poll_s = check_busy_poll(busy_poll)
        limits = limits or Limits()
        self._session = session_of(
            endpoint,
            timeout,
            limits,
            hedge,
            lambda address: lookup.find(address, key, server_key),
            sharing_of(shared_memory, limits),
        )
        self._encoder = self._session.encoder
        self._driver: _LoopDriver | _OtherThreadDriver | None = None
        self._generation = process.forks

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.endpoint}, timeout {spell(self._session.timeout)}>"

    def __reduce__(self) -> NoReturn:
        raise process.pickle_error(self, f"{self._given!r}, timeout={self._session.timeout:g}")

    @property
    def endpoint(self) -> str:
        """The daemon's address, as ZeroMQ spells it; of several, with commas between them."""
        return self._session.endpoint

    @property
    def shares_memory(self) -> bool:
        """Whether large tensors go through shared memory now; with several daemons, to any of them."""
        return self._session.shares_memory

    @property
    def traffic(self) -> Traffic | None:
        """The numbers of what was sent to each of several daemons, moved and hedged; with one daemon None."""
        return self._session.traffic if isinstance(self._session, Balancer) else None

    async def predict(
        self,
        inputs: object,
        *,
        model: str = "",
        prefer_gpu: bool = True,
        min_gpu_memory_mb: float = 0.0,
        device: str = "",
        deadline: float | None = None,
        priority: int | None = None,
        route_key: str = "",
        traceparent: str | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Run a model once, see `Client.predict`."""
        call = self._encoder.predict(
            inputs,
            model=model,
            prefer_gpu=prefer_gpu,
            min_gpu_memory_mb=min_gpu_memory_mb,
            device=device,
            deadline=deadline,
            priority=priority,
            route_key=route_key,
            timeout=timeout,
            now=time.monotonic(),
            traceparent=traceparent_of(traceparent),
        )
        return await self._here().run(call)

    async def health(self, *, timeout: float | None = None) -> HealthReport:
        """The state of the daemon."""
        return await self._here().run(self._encoder.health(timeout=timeout, now=time.monotonic()))

    async def metadata(self, model: str = "", *, timeout: float | None = None) -> ModelInfo:
        """The inputs and outputs of a model, see `Client.metadata`."""
        return await self._here().run(self._encoder.metadata(model, timeout=timeout, now=time.monotonic()))

    async def cast(self, inputs: object, model: str = "", *, timeout: float | None = None) -> dict[str, Array]:
        """The inputs as arrays of the datatypes that a model takes, see `Client.cast`."""
        from tnxctl.casting import cast

        return cast(inputs, await self.metadata(model, timeout=timeout))

    async def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """Every version of every model, loaded or not."""
        return await self._here().run(self._encoder.models(timeout=timeout, now=time.monotonic()))

    async def load(self, model: str, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """Load a version and wait until it is warm, see `Client.load`."""
        return await self._here().run(self._encoder.load(model, timeout=timeout, now=time.monotonic()))

    async def unload(self, model: str, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """Stop serving a version and wait until its memory is free, see `Client.unload`."""
        return await self._here().run(self._encoder.unload(model, timeout=timeout, now=time.monotonic()))

    async def route(
        self,
        model: str,
        weights: Mapping[str, float] | Mapping[int, float],
        shadow: str | int = "",
        *,
        timeout: float | None = None,
    ) -> tuple[ModelInfo, ...]:
        """Split the traffic of a model, see `Client.route`."""
        call = self._encoder.route(model, weights, shadow=shadow, timeout=timeout, now=time.monotonic())
        return await self._here().run(call)

    async def reload(self, *, timeout: float | None = None) -> ReloadReport:
        """Have the daemon scan its model repository again, see `Client.reload`."""
        return await self._here().run(self._encoder.reload(timeout=timeout, now=time.monotonic()))

    async def compare(
        self, model: str, baseline: str | int, candidate: str | int, *, timeout: float | None = None
    ) -> Comparison:
        """The differences of a shadow version's answers, see `Client.compare`."""
        call = self._encoder.compare(model, baseline, candidate, timeout=timeout, now=time.monotonic())
        return await self._here().run(call)

    async def whoami(self, *, timeout: float | None = None) -> Identity:
        """The name that the daemon knows this client by, its role and its limits."""
        return await self._here().run(self._encoder.whoami(timeout=timeout, now=time.monotonic()))

    async def clients(self, *, timeout: float | None = None) -> ClientsReport:
        """The clients that are connected to the daemon, see `Client.clients`."""
        return await self._here().run(self._encoder.clients(timeout=timeout, now=time.monotonic()))

    async def kick(self, client: str, *, timeout: float | None = None) -> int:
        """End all connections of a client but this one, see `Client.kick`."""
        call = self._encoder.kick(client, timeout=timeout, now=time.monotonic())
        return (await self._here().run(call)).connections

    async def keys(self, *, timeout: float | None = None) -> KeysReport:
        """The keys that may connect, see `Client.keys`."""
        return await self._here().run(self._encoder.keys(timeout=timeout, now=time.monotonic()))

    async def stats(self, *, timeout: float | None = None) -> StatsReport:
        """The raw counts of the daemon since its start, see `Client.stats`."""
        return await self._here().run(self._encoder.stats(timeout=timeout, now=time.monotonic()))

    async def explain(
        self, request: int | None = None, *, model: str = "", timeout: float | None = None
    ) -> tuple[SlowRequest, ...]:
        """The slowest requests of the last minute, see `Client.explain`."""
        call = self._encoder.explain(request, model, timeout=timeout, now=time.monotonic())
        return await self._here().run(call)

    async def record(
        self,
        file: str,
        *,
        seconds: float = 60.0,
        model: str = "",
        sample: float = 1.0,
        timeout: float | None = None,
    ) -> RecordingReport:
        """Have the daemon write the requests that come to a file on its host, see `Client.record`."""
        call = self._encoder.record(file, seconds, model, sample, timeout=timeout, now=time.monotonic())
        return await self._here().run(call)

    async def stop_recording(self, *, timeout: float | None = None) -> RecordingReport:
        """End the recording that is under way, see `Client.stop_recording`."""
        return await self._here().run(self._encoder.stop_recording(timeout=timeout, now=time.monotonic()))

    async def recording(self, *, timeout: float | None = None) -> RecordingReport:
        """The recording that is under way, or else the last one, see `Client.recording`."""
        return await self._here().run(self._encoder.recording(timeout=timeout, now=time.monotonic()))

    async def close(self) -> None:
        """Close the connection. Calls under way fail with Cancelled. Idempotent."""
        if self._generation == process.forks:  # else it is a parent's
            self._here().close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        driver = getattr(self, "_driver", None)
        if (
            driver is not None and self._generation == process.forks
        ):  # else it is a parent's, and so is the loop's poller
            driver.forget()

    def _here(self) -> _LoopDriver | _OtherThreadDriver:
        """The driver, bound to the running loop by the first call."""
        loop = asyncio.get_running_loop()
        if self._generation != process.forks and self._driver is not None:
            raise process.fork_error(self.endpoint)
        if self._driver is None:
            self._generation = process.forks
            if _can_watch(loop):
                self._driver = _LoopDriver(self._session, loop, self._busy_poll_s)
            else:
                self._driver = _OtherThreadDriver(self._session, loop)
        elif self._driver.loop is not loop:
            raise FailedPrecondition(f"the client of {self.endpoint} belongs to another event loop: make one per loop")
        return self._driver


class _LoopDriver:
    """Driver of calls in callbacks of the event loop.

    libzmq's file descriptors are edge-triggered: they tell of a change once, and any use of the socket may swallow
    it. So each use of such a socket is followed by a look at its events, also if no reply is due: one that nobody waits
    for any more, once its event is gone, keeps those that follow from telling of themselves.

    A call that finds no other under way is sent at once. What is sent beside others in one turn of the loop goes out
    together at its end: a system call for each would cost more than all else that a client does for a call.
    """

    def __init__(self, session: Session | Balancer, loop: asyncio.AbstractEventLoop, busy_poll_s: float) -> None:
        self.loop = loop
        self._session = session
        self._busy_poll = BusyPoll(loop, busy_poll_s) if busy_poll_s else None
        self._link = link_of(session, Watcher(self._watch, self._unwatch))
        self._is_single = isinstance(self._link, Link)  # of several daemons, a reply may be the cue for another message
        self._flush_is_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = math.inf
        self._turn_is_due = False
        self._ended = threading.Event()
        process.register(self)

    async def run(self, call: Call[T]) -> T:
        future: asyncio.Future[T] = self.loop.create_future()
        call.waiter = future
        link = self._link
        is_alone = self._session.idle
        if not is_alone:
            self._flush_soon()
        link.start(call)
        if call.done:
            _settle(call)
        elif link.is_edge_triggered and (not is_alone or link.has_input()):
            self._check_again()  # alone, a look is cheaper than another turn of the loop
        self._set_timer()
        busy_poll = self._busy_poll if is_alone else None
        if busy_poll is not None:
            busy_poll.sent()
        began = time.monotonic()
        try:
            return await future
        except asyncio.CancelledError:
            link.cancel(call)
            if link.is_edge_triggered:
                self._check_again()
            raise
        finally:
            if busy_poll is not None:
                busy_poll.answered(time.monotonic() - began)
            del future  # else it, its exception and this frame would keep each other, and the inputs, alive

    def close(self) -> None:
        _settle_all(self._session.close())
        self._close_link()

    def forget(self) -> None:
        """Close after the client has gone: the loop may be over, or run in another thread than this one.

        Whoever may have waited has gone, too, as he had the client.
        """
        if self.loop.is_running():
            with contextlib.suppress(RuntimeError):  # it was closed just now
                self.loop.call_soon_threadsafe(self._end)
        else:
            self._end()

    def at_exit(self) -> None:
        """Give everything up, since the interpreter ends: nobody waits for it any more."""
        self.forget()
        self._ended.wait(_GRACE_S)  # another thread may run the loop, and a callback may keep it

    def after_fork(self) -> None:
        """Leave all to the parent, in a forked child: the loop's poller is the parent's as well."""
        self._link.abandon()

    def _end(self) -> None:
        """Close without a word to those who wait."""
        self._session.close()
        self._close_link()
        self._ended.set()

    def _close_link(self) -> None:
        self._link.close()
        self._cancel_timer()
        if self._busy_poll is not None:
            self._busy_poll.end()

    def _flush_soon(self) -> None:
        """Have what is sent in this turn of the loop go out together, in the next."""
        if not self._flush_is_due:
            self._flush_is_due = True
            self._link.hold()
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        self._link.flush()

    def _check_again(self) -> None:
        """Check for messages once more after sending one, which may have cleared the event of one that came.

        One check will do for all that are sent in one turn of the loop.
        """
        if not self._turn_is_due:
            self._turn_is_due = True
            self.loop.call_soon(self._turn_again)

    def _turn_again(self) -> None:
        self._turn_is_due = False
        self._receive()

    def _turn(self) -> None:
        """Handle all events that wait, without blocking."""
        _settle_all(self._link.poll_events())
        self._receive()

    def _receive(self) -> None:
        """Take the replies that wait, without blocking."""
        if self._link.drain(_REPLIES_PER_TURN, _settle):
            self._check_again()
        self._set_timer()

    def _on_time(self) -> None:
        self._timer, self._timer_due = None, math.inf
        _settle_all(self._link.on_timer(time.monotonic()))
        self._turn()  # sockets opened just now may hold events already

    def _set_timer(self) -> None:
        due = self._session.next_timer
        if due < self._timer_due:  # a timer that goes off early does no harm
            self._cancel_timer()
            self._timer_due = due
            self._timer = self.loop.call_later(min(max(0.0, due - time.monotonic()), _MAX_WAIT_S), self._on_time)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_due = None, math.inf

    def _watch(self, source: int, mask: int, has_no_messages: bool) -> None:
        if mask & POLLIN:
            self.loop.add_reader(source, self._receive if self._is_single and not has_no_messages else self._turn)
        else:
            self.loop.remove_reader(source)
        if mask & POLLOUT:
            self.loop.add_writer(source, self._go_on, source)
        else:
            self.loop.remove_writer(source)

    def _go_on(self, source: int) -> None:
        """Go on where there is room to send, or a connection stands."""
        _settle_all(self._link.handle(source, POLLOUT))
        self._set_timer()

    def _unwatch(self, closing: int) -> None:
        if not self.loop.is_closed():
            self.loop.remove_reader(closing)
            self.loop.remove_writer(closing)


class _OtherThreadDriver:
    """A driver for loops that cannot watch a file descriptor, as the default one of Windows: an I/O thread does it."""

    def __init__(self, session: Session | Balancer, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._driver = ThreadDriver(session)

    async def run(self, call: Call[T]) -> T:
        return await asyncio.wrap_future(self._driver.submit(call), loop=self.loop)

    def close(self) -> None:
        self._driver.close()

    def forget(self) -> None:
        """Nothing is left to do: the thread driver closes itself."""


def _can_watch(loop: asyncio.AbstractEventLoop) -> bool:
    reader, writer = socket.socketpair()
    try:
        loop.add_reader(reader, lambda: None)
        loop.remove_reader(reader)
    except NotImplementedError:
        return False
    finally:
        reader.close()
        writer.close()
    return True


def _settle(call: Call[Any]) -> None:
    """Give a finished call to its future, unless the task that waited has been cancelled."""
    future, call.waiter = call.waiter, None
    if future.done():
        return
    error = call.error
    if error is None:
        future.set_result(call.take())
    else:
        future.set_exception(error)


def _settle_all(calls: Iterable[Call[Any]]) -> None:
    for call in calls:
        _settle(call)
