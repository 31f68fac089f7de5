"""RPCs of one service: reads messages within limits, has a function answer, and sends what it answers, or its error.

On the wire a unary RPC is a stream of one request. All RPCs are taken as streams here: a request is read once it is
known that it may be asked, and within a time, and what is no message of its kind gets a status like all that is wrong.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from tnxctl.bridge.bridge import Bridge, Question
from tnxctl.bridge.grpc.deliveries import Deliveries
from tnxctl.bridge.grpc.messages import parsed
from tnxctl.bridge.grpc.statuses import abort
from tnxctl.protocol import wire
from tnxctl.protocol.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    TensorNextError,
    Unavailable,
)

T = TypeVar("T")

Readers = set[asyncio.Task[None]]

STREAM_WINDOW = 32
"""Requests of one stream that are under way at a time; one more is read when the first of them is answered."""

_LONG_BYTES = 64 * 1024  # of an answer: what is shorter is taken by the buffers that each connection has

_LEAST_S = 1e-6  # once it is over, gRPC cancels the call by itself

_log = logging.getLogger("tnxctl.bridge")


class Call:
    """One RPC under way.

    Attributes:
        bridge: of the worker. client: asks the daemon.
        address: that it comes from, as HOST:PORT.
    """

    __slots__ = ("_context", "address", "bridge", "client")

    def __init__(self, bridge: Bridge, context: Any) -> None:
        self.bridge = bridge
        self.client = bridge.client
        self._context = context
        _, _, self.address = unquote(context.peer()).partition(":")

    @property
    def remaining_s(self) -> float | None:
        """Seconds until its deadline, above 0 and no more than a deadline may be; None: it has none."""
        seconds = self._context.time_remaining()
        return None if seconds is None else min(max(seconds, _LEAST_S), wire.MAX_DEADLINE_US / 1e6)

    async def ask_one(self, ask: Question[T], most_s: float | None = None) -> T:
        """Answer of one daemon, as `Bridge.ask_one`, before the deadline and within `most_s` seconds."""
        limits = [seconds for seconds in (self.remaining_s, most_s) if seconds is not None]
        return await self.bridge.ask_one(ask, min(limits, default=None))

    def check_size(self, nbytes: int) -> None:
        """Check the size of what protobuf reads. Raises ResourceExhausted."""
        most = self.bridge.settings.limits.json_bytes
        if nbytes > most:
            raise ResourceExhausted(f"the message has {nbytes} bytes beside raw contents, and may have {most}")

    @property
    def authorization(self) -> str:
        """Value of the metadata of that name; "" without it."""
        for name, value in self._context.invocation_metadata():
            if name == "authorization":
                return str(value)
        return ""


class Method(NamedTuple):
    """The answer to one RPC.

    Attributes:
        answer: makes the response of a request. It raises errors of `tnxctl`.
        verb: what it asks of the daemon, whose role it needs (`tnxctl.protocol.roles`); None: nothing that anybody may
            not know.
        about: the field of a request with the model that an order is about; "": it is no order.
        failure: for a stream, makes the response that tells the error of one of its requests.
        takes_bytes: whether `answer` reads its request, and encodes its response, by itself.
    """

    answer: Callable[[Call, Any], Awaitable[Any]]
    verb: type[wire.Request] | None
    about: str = ""
    failure: Callable[[TensorNextError], Any] | None = None
    takes_bytes: bool = False


class Calls(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Handler of the RPCs of one service.

    Args:
        methods: by name. One of the service that is missing gets UNIMPLEMENTED, as one that gRPC does not know does.
        readers: where the tasks are put that read requests of streams. A stream whose reader is cancelled answers what
            has come, and ends.
        deliveries: of answers; it ends connections whose clients do not take them.
    """

    def __init__(
        self,
        bridge: Bridge,
        service: ServiceDescriptor,
        methods: Mapping[str, Method],
        readers: Readers,
        deliveries: Deliveries,
    ) -> None:
        self._handlers = {
            f"/{service.full_name}/{name}": _handler(bridge, service.methods_by_name[name], method, readers, deliveries)
            for name, method in methods.items()
        }

    def service(self, handler_call_details: Any) -> Any:
        """The handler of an RPC, if it is one of these."""
        return self._handlers.get(handler_call_details.method)


def _handler(
    bridge: Bridge, descriptor: MethodDescriptor, method: Method, readers: Readers, deliveries: Deliveries
) -> Any:
    answerer = _Answerer(bridge, descriptor, method, readers, deliveries)
    return grpc.stream_stream_rpc_method_handler(answerer.stream if descriptor.client_streaming else answerer.unary)


class _Window:
    """Window of a stream. Args: most: requests that may be under way. Attributes: under_way: those that are."""

    def __init__(self, most: int) -> None:
        self._free = asyncio.Semaphore(most)
        self.under_way = 0

    async def enter(self) -> None:
        """Count a request, and wait until one more has room."""
        self.under_way += 1
        await self._free.acquire()

    def leave(self) -> None:
        """Count a request no more, once it is answered."""
        self.under_way -= 1
        self._free.release()


class _Answerer:
    """Answers to the RPCs of one method."""

    def __init__(
        self, bridge: Bridge, descriptor: MethodDescriptor, method: Method, readers: Readers, deliveries: Deliveries
    ) -> None:
        self._bridge = bridge
        self._readers = readers
        self._deliveries = deliveries
        self._request: Any = message_factory.GetMessageClass(descriptor.input_type)
        self._method = method

    async def unary(self, requests: Any, context: Any) -> None:
        """Answer the only request."""
        call = Call(self._bridge, context)
        try:
            self._check(call)
            await self._write(call, context, await self._answer(call, await self._only_message(context)))
        except TensorNextError as error:
            await abort(context, error)

    async def stream(self, requests: Any, context: Any) -> None:
        """Answer many requests, beside each other and in their order; an error ends none but its own.

        A stream that has no request for long is ended, as a connection of HTTP is.
        """
        call = Call(self._bridge, context)
        try:
            self._check(call)
        except TensorNextError as error:
            await abort(context, error)
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        window = _Window(STREAM_WINDOW)
        ended: TensorNextError | None = None
        try:
            async with asyncio.TaskGroup() as tasks:

                async def read() -> None:
                    try:
                        while (data := await self._next_message(context, window)) is not grpc.aio.EOF:
                            answers.put_nowait(tasks.create_task(self._answer_or_failure(call, data)))
                            await window.enter()
                    finally:
                        answers.put_nowait(None)

                reader = tasks.create_task(read())
                self._readers.add(reader)
                reader.add_done_callback(self._readers.discard)
                while (task := await answers.get()) is not None:
                    try:
                        await self._write(call, context, await task)
                    except Unavailable as error:
                        await self._write(call, context, self._failure(error))
                    window.leave()
        except* TensorNextError as group:
            ended = group.exceptions[0]  # type: ignore[assignment]  # it is not in another group
        if ended is None and reader.cancelled():
            ended = Unavailable("the bridge ends")
        if ended is not None:
            await abort(context, ended)

    async def _next_message(self, context: Any, window: _Window) -> Any:
        """The next message of a stream, or its end. Raises DeadlineExceeded: none has come for long."""
        seconds = self._bridge.settings.limits.idle_timeout_s
        reading = asyncio.ensure_future(context.read())
        try:
            while not (await asyncio.wait((reading,), timeout=seconds))[0]:
                if not window.under_way:
                    raise DeadlineExceeded(f"the stream had no request for {seconds:g} s")
        except BaseException:
            reading.cancel()
            raise
        return reading.result()

    async def _write(self, call: Call, context: Any, answer: bytes) -> None:
        """Send an answer. A long one is held until the client has let it come, or its call is over.

        A client that does not let it come in time loses its connection. Less than that would not help: the status of a
        call that is ended here waits behind the answer.

        Raises Unavailable: there is no memory for it now.
        """
        nbytes = len(answer) if len(answer) >= _LONG_BYTES else 0
        self._bridge.budget.hold(nbytes)
        try:
            with self._deliveries.begin(call.address, len(answer)):
                await context.write(answer)
        except grpc.aio.InternalError:  # the client has gone, as its cancelling is about to say
            raise asyncio.CancelledError from None
        finally:
            self._bridge.budget.release(nbytes)

    async def _answer_or_failure(self, call: Call, data: bytes) -> bytes:
        try:
            return await self._answer(call, data)
        except TensorNextError as error:
            return self._failure(error)

    def _failure(self, error: TensorNextError) -> bytes:
        """The response that tells the error of a request of a stream."""
        assert self._method.failure is not None
        return self._method.failure(error).SerializeToString()  # type: ignore[no-any-return]

    def _check(self, call: Call) -> None:
        """Check that this may be asked, before any of it is read. Raises Unauthenticated, PermissionDenied."""
        self._bridge.access.check(call.authorization, self._method.verb, call.address)

    async def _only_message(self, context: Any) -> bytes:
        """The message of a unary RPC. Raises DeadlineExceeded, and InvalidArgument if the client sent none."""
        seconds = self._bridge.settings.limits.message_timeout_s
        try:
            async with asyncio.timeout(seconds):
                data: Any = await context.read()
        except TimeoutError:
            raise DeadlineExceeded(f"the request did not come whole within {seconds:g} s") from None
        if data is grpc.aio.EOF:
            raise InvalidArgument("the request has no message")
        return data  # type: ignore[no-any-return]

    async def _answer(self, call: Call, data: bytes) -> bytes:
        """The response to one request, encoded. Raises errors of `tnxctl` and no others."""
        budget, nbytes = self._bridge.budget, len(data)
        budget.hold(nbytes)
        try:
            if self._method.takes_bytes:
                return await self._method.answer(call, data)  # type: ignore[no-any-return]
            call.check_size(nbytes)
            request = parsed(self._request, data)
            if self._method.about:
                about = getattr(request, self._method.about)
                self._bridge.access.admit(call.authorization, self._method.verb, call.address, about)
            response = await self._method.answer(call, request)
            return response.SerializeToString()  # type: ignore[no-any-return]
        except TensorNextError:
            raise
        except Exception:
            _log.exception("a handler failed")
            raise Internal("the bridge failed; its log says how") from None
        finally:
            budget.release(nbytes)
