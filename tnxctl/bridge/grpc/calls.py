"""RPCs of one service: reads messages within limits, has a function answer, and sends what it answers, or its error.

On the wire a unary RPC is a stream of one request. All RPCs are taken as streams here, so that a request is read when
there is a time limit on it, and what is no message of its kind gets a status of ours.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError

from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.grpc.statuses import abort
from tnxctl.protocol import wire
from tnxctl.protocol.errors import DeadlineExceeded, Internal, InvalidArgument, TensorNextError, Unavailable

MESSAGE_TIMEOUT_S = 60.0
"""Seconds for the message of a unary RPC to come whole: gRPC does not tell how much of one has come."""

STREAM_WINDOW = 32
"""Requests of one stream that are under way at a time; one more is read when the first of them is answered."""

_log = logging.getLogger("tnxctl.bridge")


class Call:
    """One RPC under way.

    Attributes:
        bridge: of the worker.
    """

    __slots__ = ("_context", "bridge")

    def __init__(self, bridge: Bridge, context: Any) -> None:
        self.bridge = bridge
        self._context = context

    @property
    def remaining_s(self) -> float | None:
        """Seconds until its deadline; None: it has none."""
        seconds: float | None = self._context.time_remaining()
        return seconds


class Method(NamedTuple):
    """The answer to one RPC.

    Attributes:
        answer: makes the response of a request. It raises an error of `tnxctl`.
        verb: what it asks of the daemon, whose role it needs (`tnxctl.protocol.roles`); None: nothing that anybody may
            not know.
        failure: for a stream, makes the response that tells the error of one request.
    """

    answer: Callable[[Call, Any], Awaitable[Any]]
    verb: type[wire.Request] | None
    failure: Callable[[Any, TensorNextError], Any] | None = None


class Calls(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Handler of the RPCs of one service.

    Args:
        methods: by name. One of the service that is missing gets UNIMPLEMENTED, as one that gRPC does not know does.
    """

    def __init__(self, bridge: Bridge, service: ServiceDescriptor, methods: Mapping[str, Method]) -> None:
        self._handlers = {
            f"/{service.full_name}/{name}": _handler(_Method(bridge, service.methods_by_name[name], method))
            for name, method in methods.items()
        }

    def service(self, handler_call_details: Any) -> Any:
        """The handler of an RPC, if it is one of these."""
        return self._handlers.get(handler_call_details.method)
