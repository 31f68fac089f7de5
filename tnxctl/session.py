"""The client without its I/O: which calls are under way, what to send, what a reply means, when to give up.

    Session.predict(...) -> Call            encodes a request; may run in any thread
    Session.start(call)                     registers it; says whether it can be sent now
    Session.connected() -> calls to send    a connection stands: everything pending goes out on it
    Session.receive(frames) -> Call         the call that this reply finishes
    Session.lost(now) / expire(now)         -> calls that have failed
    Session.due                             when to look again

No socket, no thread, no clock: times come in as arguments, in seconds of any monotonic clock. The shells
(`tnxctl.client`, `tnxctl.aio`) only wait, and hand finished calls to whoever asked.

A call is sent when a connection stands and again on each new one, until it is answered: `predict` is pure, so
running it twice does no harm, and a call outlives a restart of the daemon if its timeout allows. Each connection
is a new peer to the daemon, so a repeated id never meets its first use.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from tnxctl import wire
from tnxctl.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    TensorNextError,
    Unavailable,
    from_code,
)
from tnxctl.results import Result
from tnxctl.wire import HealthReport, Limits, ModelInfo

if TYPE_CHECKING:
    from tnxctl.frames import Array

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 5.0

MAX_PENDING_CALLS = 65_536
MAX_PENDING_BYTES = 1 << 30
"""Most calls and most input bytes under way from one client: beyond that a call fails at once instead of
filling the memory of a program that asks faster than the daemon answers."""

MAX_LOSSES = 3
"""How many connections may break under a call before it is given up: it may be what breaks them."""

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 1.0
"""Time from one attempt to connect to the next: doubles from the first to the last, until a reply comes."""

# Reports about many devices and models outgrow the header limit that protects a daemon from its clients.
_REPLY_HEADER_BYTES = 16 * 1024 * 1024

_log = logging.getLogger("tnxctl")


class Call(Generic[T]):
    """One request and, once `done`, its outcome.

    Attributes:
        frames: the header, then one buffer per tensor: the very arrays of the caller where they were contiguous.
        nbytes: of all tensors together.
        deadline: when it fails, by the clock that the session is given. timeout: the same as a duration.
        losses: connections that broke while it was under way.
        waiter: the future of the shell that waits for it, if any. The session never looks at it.
    """

    __slots__ = (
        "_error",
        "_read",
        "_request_type",
        "_result",
        "deadline",
        "done",
        "frames",
        "id",
        "losses",
        "nbytes",
        "timeout",
        "waiter",
    )

    def __init__(
        self,
        request: wire.Request,
        frames: Sequence[Any],
        nbytes: int,
        read: Callable[[Any, Sequence[bytes], Limits], T],
        timeout: float,
        now: float,
    ) -> None:
        self.id = request.id
        self.frames = frames
        self.nbytes = nbytes
        self.timeout = timeout
        self.deadline = now + timeout
        self.losses = 0
        self.done = False
        self.waiter: Any = None
        self._request_type = type(request)
        self._read = read
        self._result: T | None = None
        self._error: TensorNextError | None = None

    @property
    def verb(self) -> str:
        """What was asked, for error messages."""
        return self._request_type.__name__.lower()

    @property
    def error(self) -> TensorNextError | None:
        return self._error

    def take(self) -> T:
        """The result, or its error raised. Call it once, when `done`."""
        error, self._error = self._error, None
        if error is None:
            return self._result  # type: ignore[return-value]  # done without an error: it is there
        try:
            raise error
        finally:
            del error  # else the traceback and this frame would keep each other, and the inputs, alive

    def succeed(self, reply: wire.Reply, frames: Sequence[bytes], limits: Limits) -> None:
        """Raises InvalidArgument if the reply is not what this call asked for."""
        self._result = self._read(reply, frames, limits)
        self._finish()

    def fail(self, error: TensorNextError) -> None:
        self._error = error
        self._finish()

    def _finish(self) -> None:
        self.done = True
        self.frames = ()


class Session:
    """All calls of one client to one endpoint.

    `predict`, `health` and `metadata` may be used from any thread; the rest from one thread at a time.
    """

    def __init__(self, endpoint: str, timeout: float, limits: Limits) -> None:
        self.endpoint = endpoint
        self.timeout = _check_timeout(timeout)
        self.limits = limits
        self._reply_limits = msgspec.structs.replace(limits, header_bytes=max(limits.header_bytes, _REPLY_HEADER_BYTES))
        self.max_frame_bytes = max(limits.message_bytes, self._reply_limits.header_bytes)
        self._ids = itertools.count(1)
        self._pending: dict[int | None, Call[Any]] = {}
        self._pending_bytes = 0
        self._closed = False
        # No pending call expires earlier; it may lie too early, then a look at the calls sets it right.
        self._expiry = math.inf
        self._connected = False
        self._connecting = False
        self._retry_at = -math.inf
        self._retry_s = FIRST_RETRY_S
        self._trouble = "the attempt to connect is still under way"

    # --- requests --------------------------------------------------------------------------------------------

    def predict(
        self,
        inputs: object,
        *,
        model: str,
        prefer_gpu: bool,
        min_gpu_memory_mb: float,
        timeout: float | None,
        now: float,
        copy: bool = False,
    ) -> Call[Result]:
        """Encode a predict request.

        Args:
            inputs: one array, or a mapping of names to arrays: see `tnxctl.tensors.to_wire`.
            copy: take the inputs as they are now. Otherwise they must stay unchanged until the call is done.

        Raises:
            InvalidArgument: an argument that can never work; the sentence names it.
        """
        from tnxctl.tensors import pack  # numpy costs more to import than all of `tnxctl health`

        specs, arrays, nbytes = pack(inputs, self.limits, copy)
        request = wire.Predict(
            v=wire.VERSION,
            id=next(self._ids),
            inputs=specs,
            model=_check_model(model),
            prefer_gpu=_check_flag("prefer_gpu", prefer_gpu),
            min_gpu_memory_mb=_check_megabytes("min_gpu_memory_mb", min_gpu_memory_mb),
        )
        return self._call(request, arrays, nbytes, _read_result, timeout, now)

    def health(self, *, timeout: float | None, now: float) -> Call[HealthReport]:
        """Encode a health request."""
        request = wire.Health(v=wire.VERSION, id=next(self._ids))
        return self._call(request, [], 0, _read_health, timeout, now)

    def metadata(self, model: str, *, timeout: float | None, now: float) -> Call[ModelInfo]:
        """Encode a metadata request."""
        request = wire.Metadata(v=wire.VERSION, id=next(self._ids), model=_check_model(model))
        return self._call(request, [], 0, _read_metadata, timeout, now)

    def _call(
        self,
        request: wire.Request,
        arrays: list[Array],
        nbytes: int,
        read: Callable[[Any, Sequence[bytes], Limits], T],
        timeout: float | None,
        now: float,
    ) -> Call[T]:
        try:
            header = wire.encode(request)
        except ValueError as error:  # a lone surrogate has no UTF-8
            raise InvalidArgument(f"the request cannot be encoded: {error}") from None
        if len(header) > self.limits.header_bytes:
            raise InvalidArgument(
                f"the names and shapes take {len(header)} bytes, more than the limit of {self.limits.header_bytes}"
            )
        seconds = self.timeout if timeout is None else _check_timeout(timeout)
        return Call(request, [header, *arrays], nbytes, read, seconds, now)

    # --- calls under way -------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing is under way."""
        return not self._pending

    @property
    def due(self) -> float:
        """When `expire` or `must_connect` may have something to say."""
        if self._connected or self._connecting or not self._pending:
            return self._expiry
        return min(self._expiry, self._retry_at)

    def start(self, call: Call[Any]) -> bool:
        """Take a call under way. True: send it now. It may also be `done` at once, with the reason as its error."""
        if self._closed:
            call.fail(FailedPrecondition(f"the client of {self.endpoint} is closed"))
            return False
        pending = self._pending
        full = len(pending) >= MAX_PENDING_CALLS or self._pending_bytes + call.nbytes > MAX_PENDING_BYTES
        if full and pending:  # a single call is bounded by the limits of a message
            call.fail(
                ResourceExhausted(
                    f"{len(pending)} calls with {self._pending_bytes} bytes wait for {self.endpoint} already, "
                    f"the limits are {MAX_PENDING_CALLS} and {MAX_PENDING_BYTES}"
                )
            )
            return False
        if not pending:  # nobody has been waiting for a connection: the new caller shall not wait for a retry
            self._retry_at = -math.inf
            self._retry_s = FIRST_RETRY_S
        pending[call.id] = call
        self._pending_bytes += call.nbytes
        if call.deadline < self._expiry:
            self._expiry = call.deadline
        return self._connected

    def forget(self, call: Call[Any]) -> bool:
        """Drop a call: its reply, should one come, is ignored. False: it was not under way."""
        return self._pop(call.id) is not None

    def receive(self, frames: Sequence[bytes]) -> Call[Any] | None:
        """Take a message from the daemon, whatever it holds. Returns the call that it finished, if any."""
        try:
            reply = wire.decode_reply(frames[0], self._reply_limits)
        except TensorNextError as error:
            return self._receive_malformed(frames[0], error)
        call = self._pop(reply.id)
        if call is None:
            _log.debug("dropped a reply that nobody waits for: %.200r", reply)
            return None
        self._retry_s = FIRST_RETRY_S
        if isinstance(reply, wire.ErrorReply):
            call.fail(from_code(reply.code, reply.message))
            return call
        try:
            call.succeed(reply, frames, self._reply_limits)
        except InvalidArgument as error:
            call.fail(self._malformed(call, error))
        return call

    def expire(self, now: float) -> list[Call[Any]]:
        """Fail the calls whose time is over."""
        if now < self._expiry:
            return []
        expired = [call for call in self._pending.values() if call.deadline <= now]
        for call in expired:
            self._pop(call.id)
            call.fail(self._timeout_error(call))
        self._expiry = min((call.deadline for call in self._pending.values()), default=math.inf)
        return expired

    def close(self) -> list[Call[Any]]:
        """Fail everything that is under way, and every later call. Idempotent."""
        self._closed = True
        calls = list(self._pending.values())
        for call in calls:
            self._pop(call.id)
            call.fail(Cancelled(f"the client of {self.endpoint} was closed before {call.verb} was answered"))
        return calls

    def _pop(self, call_id: int | None) -> Call[Any] | None:
        call = self._pending.pop(call_id, None)
        if call is not None:
            self._pending_bytes -= call.nbytes
        return call

    def _receive_malformed(self, header: bytes, error: TensorNextError) -> Call[Any] | None:
        call = self._pop(wire.request_id(header, self._reply_limits))
        if call is None:
            _log.debug("dropped a message from %s: %s", self.endpoint, error)
            return None
        call.fail(self._malformed(call, error))
        return call

    def _malformed(self, call: Call[Any], error: TensorNextError) -> Internal:
        return Internal(f"{self.endpoint} answered {call.verb} with a malformed reply: {error.message}")

    def _timeout_error(self, call: Call[Any]) -> DeadlineExceeded | Unavailable:
        if self._connected:
            return DeadlineExceeded(f"{self.endpoint} did not answer {call.verb} within {call.timeout:g} s")
        what = "lost the connection and got none again" if call.losses else "no connection"
        return Unavailable(f"{self.endpoint}: {what} within {call.timeout:g} s: {self._trouble}")

    # --- the connection --------------------------------------------------------------------------------------

    def must_connect(self, now: float) -> bool:
        """There are calls to send, no connection stands or is being made, and it is time to try."""
        return not (self._connected or self._connecting) and bool(self._pending) and now >= self._retry_at

    def connecting(self, now: float) -> None:
        """An attempt to connect begins."""
        self._connecting = True
        self._retry_at = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)

    def note_trouble(self, trouble: str) -> None:
        """How far the attempt to connect came, or why it failed: a clause for error messages."""
        self._trouble = trouble

    def connected(self) -> list[Call[Any]]:
        """The attempt succeeded. Returns what to send now, in order."""
        self._connecting = False
        self._connected = True
        return list(self._pending.values())

    def lost(self) -> list[Call[Any]]:
        """The attempt failed or the connection broke. Returns the calls that fail now; the others wait."""
        failed = []
        if self._connected:
            for call in list(self._pending.values()):
                call.losses += 1
                if call.losses >= MAX_LOSSES:
                    self._pop(call.id)
                    call.fail(
                        Unavailable(
                            f"{self.endpoint}: the connection broke {call.losses} times while {call.verb} was "
                            f"under way: {self._trouble}"
                        )
                    )
                    failed.append(call)
        self.disconnected()
        return failed

    def disconnected(self) -> None:
        """This side has closed the connection: no call is to blame."""
        self._connected = self._connecting = False


# --- what each verb's reply holds ----------------------------------------------------------------------------


def _read_result(reply: wire.Reply, frames: Sequence[bytes], limits: Limits) -> Result:
    if not isinstance(reply, wire.Result):
        raise _unexpected(reply, "a result")
    from tnxctl.tensors import unpack

    return Result(
        outputs=unpack(reply.outputs, frames[1:], limits),
        model=reply.model,
        version=reply.version,
        device=reply.device,
        reason=reply.reason,
        batch_size=reply.batch_size,
        latency_ms=reply.latency_ms,
        gpu_memory_mb=reply.gpu_memory_mb,
        timing=reply.timing,
    )


def _read_health(reply: wire.Reply, frames: Sequence[bytes], limits: Limits) -> HealthReport:
    if not isinstance(reply, HealthReport):
        raise _unexpected(reply, "a health report")
    _check_no_tensors(frames)
    return reply


def _read_metadata(reply: wire.Reply, frames: Sequence[bytes], limits: Limits) -> ModelInfo:
    if not isinstance(reply, wire.MetadataReport):
        raise _unexpected(reply, "a metadata report")
    _check_no_tensors(frames)
    return reply.model


def _check_no_tensors(frames: Sequence[bytes]) -> None:
    if len(frames) > 1:
        raise InvalidArgument(f"{len(frames) - 1} tensor frames came with a reply that has none")


def _unexpected(reply: wire.Reply, expected: str) -> InvalidArgument:
    return InvalidArgument(f"expected {expected}, got {type(reply).__name__}")


# --- arguments -----------------------------------------------------------------------------------------------


def _check_timeout(value: float) -> float:
    try:
        if 0 < value < math.inf:
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise InvalidArgument(f"timeout {value!r}: expected a positive, finite number of seconds")


def _check_model(value: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(f"model {value!r}: expected a string, got {type(value).__name__}")
    return value


def _check_flag(name: str, value: bool) -> bool:
    if value is not True and value is not False:
        raise InvalidArgument(f"{name} {value!r}: expected True or False")
    return value


def _check_megabytes(name: str, value: float) -> float:
    try:
        if value >= 0:  # which NaN is not
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise InvalidArgument(f"{name} {value!r}: expected a number of MiB, 0 or more")
