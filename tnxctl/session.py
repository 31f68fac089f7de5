"""The client without its I/O: which calls are under way, what to send, what a reply means, when to give up.

    Session.predict(...) -> Call            encodes a request; may run in any thread
    Session.start(call)                     registers it; says whether it can be sent now
    Session.connected(now) -> calls to send a connection stands: everything pending goes out on it
    Session.receive(frames, now) -> Call    the call that this reply finishes
    Session.lost() / expire(now)            -> calls that have failed
    Session.disconnected()                  likewise, when this side has closed the connection
    Session.cancellation(call)              what tells the daemon that nobody waits for the answer any more
    Session.question()                      what asks the daemon how it is, when there is doubt about it
    Session.silent(now), give_up()          a connection that stands and carries nothing
    Session.due                             when to look again

No socket, no thread, no clock: times come in as arguments, in seconds of any monotonic clock. The shells
(`tnxctl.client`, `tnxctl.aio`) only wait, and hand finished calls to whoever asked.

A call is sent when a connection stands and again on each new one, until it is answered: `predict` is pure, so
running it twice does no harm, and a call outlives a restart of the daemon if its timeout allows. Each connection
is a new peer to the daemon, so a repeated id never meets its first use. A deadline travels as a duration, so
a call with one goes out on a new connection with what is left of it, and not at all when nothing is.

`load`, `unload`, `route` and `reload` change what the daemon serves, and are never sent twice. To ask for the same
again would be harmless in itself. But a load may be what killed the daemon, and must not kill the next one; and what
somebody else has changed since must not be undone by a message from before. So such a call fails when the connection
breaks under it, and whoever asked decides. Since it may take minutes, it also fails early while nobody is there: it
waits for a connection no longer than other calls do.

Two doubts about a daemon are settled by asking it for its health, which it answers in every state. A connection may
stand and carry nothing: a proxy or a firewall has lost the other half, and goes on to acknowledge. So when a call has
timed out and nothing has come since it was made, and nothing comes after the question either, the connection is given
up. And a daemon ends a connection when a frame is longer than it takes, which would happen again on every new one: so
large inputs under which a connection broke are sent again only when the daemon has said how much it takes.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from tnxctl.arguments import (
    check_deadline,
    check_flag,
    check_megabytes,
    check_name,
    check_priority,
    check_string,
    check_timeout,
    check_title,
    check_version,
    check_weights,
)
from tnxctl.durations import spell
from tnxctl.protocol import wire
from tnxctl.protocol.errors import (
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
from tnxctl.protocol.wire import Comparison, HealthReport, Limits, ModelInfo, ReloadReport
from tnxctl.results import Result
from tnxctl.windows import Kind, Window, Windows, kind_of

if TYPE_CHECKING:
    from tnxctl.protocol.frames import Array

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 5.0
LOAD_TIMEOUT_S = 600.0
"""For `load`, `unload` and `reload`, unless the timeout of the client is longer: large weights take their time to
read, compilers theirs, and what is unloaded first finishes what it has."""


MAX_PENDING_CALLS = 65_536
MAX_PENDING_BYTES = 1 << 30
"""Most calls and most input bytes under way from one client: beyond that a call fails at once instead of
filling the memory of a program that asks faster than the daemon answers."""

MAX_LOSSES = 3
"""How many connections may break under a call before it is given up: it may be what breaks them."""

FIRST_SILENCE_S = 1.0
LAST_SILENCE_S = 600.0
_SILENCE_S = 5.0
_SLOW_BYTES_PER_S = 1e6
"""Time to answer the question whether the daemon is there at all: half as long as the call that timed out waited, from
the first to the middle one. It doubles with each connection that is given up, up to the last, until something comes,
and inputs under way get as long on top as a slow line takes for them: what needs very long must have an end, too."""

LARGE_BYTES = 64 * 1024
"""From so many bytes on, inputs may be what a connection broke of: it is no sane limit of a daemon."""

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 1.0
"""Time from one attempt to connect to the next: doubles from the first to the last, until a reply comes."""

# Requests that are sent once only, see above.
_CHANGES = (wire.Load, wire.Unload, wire.Route, wire.Reload)

# Reports about many devices and models outgrow the header limit that protects a daemon from its clients.
_REPLY_HEADER_BYTES = 16 * 1024 * 1024
_REPLY_TENSORS = 65_536

_log = logging.getLogger("tnxctl")


class Call(Generic[T]):
    """One request and, once `done`, its outcome.

    Attributes:
        frames: the header, then one buffer per tensor: the very arrays of the caller where they were contiguous.
        nbytes: of all tensors together.
        expires: when it fails, by the clock that the session is given. patience: the same as a duration.
        strict: that is its deadline, and an answer that comes later is worthless.
        reach: seconds within which it must be sent, for most calls all of their patience.
        due: when it fails unless something happens: unless it is sent, and once it is, unless it is answered.
        losses: connections that broke while it was under way.
        put_off: the daemon has refused it for now, so it has changed nothing there.
        refusal: what the daemon said when it put the call off, or why it is not sent again.
        window: that it counts in, if any.
        waiter: the future of the shell that waits for it, if any. The session never looks at it.
    """

    __slots__ = (
        "_error",
        "_read",
        "_request",
        "_result",
        "done",
        "due",
        "expires",
        "frames",
        "id",
        "losses",
        "nbytes",
        "patience",
        "put_off",
        "reach",
        "refusal",
        "strict",
        "waiter",
        "window",
    )

    def __init__(
        self,
        request: wire.Request,
        frames: list[Any],
        nbytes: int,
        read: Callable[[Any, Sequence[bytes], Limits], T],
        patience: float,
        strict: bool,
        reach: float,
        now: float,
    ) -> None:
        self.id = request.id
        self.frames = frames
        self.nbytes = nbytes
        self.patience = patience
        self.strict = strict
        self.expires = now + patience
        self.reach = reach
        self.due = now + reach
        self.losses = 0
        self.put_off = False
        self.refusal: Unavailable | InvalidArgument | None = None
        self.done = False
        self.waiter: Any = None
        self.window: Window | None = None
        self._request = request
        self._read = read
        self._result: T | None = None
        self._error: TensorNextError | None = None

    @property
    def verb(self) -> str:
        """The name of what was asked, for error messages."""
        return type(self._request).__name__.lower()

    @property
    def kind(self) -> Kind | None:
        """The kind that it shares with others that the daemon treats alike."""
        return kind_of(self._request)

    @property
    def error(self) -> TensorNextError | None:
        return self._error

    @property
    def can_be_withdrawn(self) -> bool:
        """Whether the daemon may hold it in a queue, as only `predict` requests are."""
        return isinstance(self._request, wire.Predict)

    @property
    def changes_daemon(self) -> bool:
        """Whether it leaves the daemon other than it was."""
        return isinstance(self._request, _CHANGES)

    @property
    def may_have_changed_it(self) -> bool:
        """Once it was sent: whether the daemon may have carried it out although no answer has come."""
        return self.changes_daemon and not self.put_off

    def sent(self) -> None:
        """It is on its way: from now on it waits for its answer."""
        self.due = self.expires
        self.put_off = False

    def renew(self, now: float) -> None:
        """Have the header say how much of the deadline, if there is one, is left."""
        request = self._request
        if isinstance(request, wire.Predict) and request.deadline_us is not None:
            left_us = min((self.expires - now) * 1e6, wire.MAX_DEADLINE_US)
            self.frames[0] = wire.encode(msgspec.structs.replace(request, deadline_us=left_us, sent_us=now * 1e6))

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
        self.frames = []


class Session:
    """All calls of one client to one endpoint.

    The methods that encode a request may be used from any thread; the rest from one thread at a time.
    """

    def __init__(self, endpoint: str, timeout: float, limits: Limits) -> None:
        self.endpoint = endpoint
        self.timeout = check_timeout(timeout)
        self.limits = limits
        # What a model has in outputs and axes, it has: a header of the daemon bounds their number well enough.
        self._reply_limits = msgspec.structs.replace(
            limits,
            header_bytes=max(limits.header_bytes, _REPLY_HEADER_BYTES),
            tensors=max(limits.tensors, _REPLY_TENSORS),
            rank=max(limits.rank, wire.MAX_RANK),
        )
        self.max_frames = self._reply_limits.tensors + 2  # one too many of them shows that the count is wrong
        self.max_frame_bytes = max(limits.message_bytes, self._reply_limits.header_bytes)
        self._ids = itertools.count(1)
        self._pending: dict[int | None, Call[Any]] = {}
        self._pending_bytes = 0
        self._windows = Windows()
        self._closed = False
        # No pending call expires earlier; it may lie too early, then a look at the calls sets it right.
        self._expiry = math.inf
        self._connected = False
        self._connecting = False
        self._retry_at = -math.inf
        self._retry_s = FIRST_RETRY_S
        self._again: list[tuple[float, int]] = []
        # About the connection that stands: when something last came, and from when on it is silent.
        self._heard_at = -math.inf
        self._silent_at = math.inf
        self._silences = 0
        # The question to the daemon: whether it is to be asked, and its id; and the calls that wait for the answer.
        self._asks = False
        self._question: int | None = None
        self._held: list[Call[Any]] = []
        self._trouble = "the attempt to connect is still under way"
        self._attempt_failed = False  # the last one

    # --- requests --------------------------------------------------------------------------------------------

    def predict(
        self,
        inputs: object,
        *,
        model: str,
        prefer_gpu: bool,
        min_gpu_memory_mb: float,
        device: str,
        deadline: float | None,
        priority: int | None,
        route_key: str,
        timeout: float | None,
        now: float,
        copy: bool = False,
    ) -> Call[Result]:
        """Encode a predict request.

        Args:
            inputs: one array, or a mapping of names to arrays: see `tnxctl.tensors.to_wire`.
            deadline: seconds from `now`; the call fails when it or the timeout is over, whichever is earlier.
            copy: take the inputs as they are now. Otherwise they must stay unchanged until the call is done.

        Raises:
            InvalidArgument: an argument that can never work; the sentence names it.
        """
        from tnxctl.tensors import pack  # numpy costs more to import than all of `tnxctl health`

        specs, arrays, nbytes = pack(inputs, self.limits, copy)
        patience = self._patience(timeout)
        strict, deadline_us = False, None
        if deadline is not None:
            seconds = check_deadline(deadline)
            strict = seconds <= patience
            patience = min(seconds, patience)
            deadline_us = patience * 1e6
        request = wire.Predict(
            v=wire.VERSION,
            id=next(self._ids),
            inputs=specs,
            model=check_string("model", model),
            prefer_gpu=check_flag("prefer_gpu", prefer_gpu),
            min_gpu_memory_mb=check_megabytes("min_gpu_memory_mb", min_gpu_memory_mb),
            device=check_string("device", device),
            deadline_us=deadline_us,
            sent_us=None if deadline_us is None else now * 1e6,
            priority=None if priority is None else check_priority(priority),
            route_key=check_string("route_key", route_key),
            max_reply_bytes=self.limits.message_bytes,
        )
        return self._call(request, arrays, nbytes, _read_result, patience, now, strict)

    def health(self, *, timeout: float | None, now: float) -> Call[HealthReport]:
        """Encode a health request."""
        request = wire.Health(v=wire.VERSION, id=next(self._ids))
        return self._call(request, [], 0, _reader(HealthReport), self._patience(timeout), now)

    def metadata(self, model: str, *, timeout: float | None, now: float) -> Call[ModelInfo]:
        """Encode a metadata request."""
        request = wire.Metadata(v=wire.VERSION, id=next(self._ids), model=check_string("model", model))
        return self._call(request, [], 0, _read_metadata, self._patience(timeout), now)

    def models(self, *, timeout: float | None, now: float) -> Call[tuple[ModelInfo, ...]]:
        """Encode a request for all models."""
        request = wire.Models(v=wire.VERSION, id=next(self._ids))
        return self._call(request, [], 0, _read_models, self._patience(timeout), now)

    def load(self, model: str, *, timeout: float | None, now: float) -> Call[tuple[ModelInfo, ...]]:
        """Encode a load request. Raises InvalidArgument if `model` is neither NAME nor NAME@VERSION."""
        request = wire.Load(v=wire.VERSION, id=next(self._ids), model=check_title(model))
        return self._slow_call(request, _read_models, timeout, now)

    def unload(self, model: str, *, timeout: float | None, now: float) -> Call[tuple[ModelInfo, ...]]:
        """Encode an unload request. Raises InvalidArgument if `model` is neither NAME nor NAME@VERSION."""
        request = wire.Unload(v=wire.VERSION, id=next(self._ids), model=check_title(model))
        return self._slow_call(request, _read_models, timeout, now)

    def route(
        self,
        model: str,
        weights: Mapping[str, float] | Mapping[int, float],
        *,
        shadow: str | int,
        timeout: float | None,
        now: float,
    ) -> Call[tuple[ModelInfo, ...]]:
        """Encode a route request. Raises InvalidArgument; the sentence names the argument."""
        request = wire.Route(
            v=wire.VERSION,
            id=next(self._ids),
            model=check_name(model),
            weights=check_weights(weights),
            shadow="" if shadow == "" else check_version("shadow", shadow),
        )
        return self._call(request, [], 0, _read_models, self._patience(timeout), now)

    def reload(self, *, timeout: float | None, now: float) -> Call[ReloadReport]:
        """Encode a reload request."""
        request = wire.Reload(v=wire.VERSION, id=next(self._ids))
        return self._slow_call(request, _reader(ReloadReport), timeout, now)

    def compare(
        self, model: str, baseline: str | int, candidate: str | int, *, timeout: float | None, now: float
    ) -> Call[Comparison]:
        """Encode a compare request. Raises InvalidArgument; the sentence names the argument."""
        request = wire.Compare(
            v=wire.VERSION,
            id=next(self._ids),
            model=check_name(model),
            baseline=check_version("baseline", baseline),
            candidate=check_version("candidate", candidate),
        )
        return self._call(request, [], 0, _reader(Comparison), self._patience(timeout), now)

    def _patience(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else check_timeout(timeout)

    def _slow_call(
        self,
        request: wire.Request,
        read: Callable[[Any, Sequence[bytes], Limits], T],
        timeout: float | None,
        now: float,
    ) -> Call[T]:
        patience = max(LOAD_TIMEOUT_S, self.timeout) if timeout is None else check_timeout(timeout)
        return self._call(request, [], 0, read, patience, now, reach=min(self.timeout, patience))

    def _call(
        self,
        request: wire.Request,
        arrays: list[Array],
        nbytes: int,
        read: Callable[[Any, Sequence[bytes], Limits], T],
        patience: float,
        now: float,
        strict: bool = False,
        reach: float | None = None,
    ) -> Call[T]:
        try:
            header = wire.encode(request)
        except ValueError as error:  # a lone surrogate has no UTF-8
            raise InvalidArgument(f"the request cannot be encoded: {error}") from None
        if len(header) > self.limits.header_bytes:
            raise InvalidArgument(
                f"the header takes {len(header)} bytes, more than the limit of {self.limits.header_bytes}"
            )
        reach = patience if reach is None else reach
        return Call(request, [header, *arrays], nbytes, read, patience, strict, reach, now)

    # --- calls under way -------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing is under way."""
        return not self._pending

    @property
    def due(self) -> float:
        """The time at which `expire`, `asked_again`, `silent` or `must_connect` may have something to say."""
        if self._connected:
            due = min(self._expiry, self._silent_at)
            return min(due, self._again[0][0]) if self._again else due
        if self._connecting or not self._pending:
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
        if self._windows and not self._has_room(call):
            return False
        if not pending:  # nobody has been waiting for a connection: the new caller shall not wait for a retry
            self._retry_at = -math.inf
            self._retry_s = FIRST_RETRY_S
        pending[call.id] = call
        self._pending_bytes += call.nbytes
        if self._connected:
            call.sent()
        if call.due < self._expiry:
            self._expiry = call.due
        return self._connected

    def _has_room(self, call: Call[Any]) -> bool:
        """Let a call into the window of its kind, if there is one. False: that is full, and the call has failed."""
        kind = call.kind
        window = None if kind is None else self._windows.find(kind, call.expires - call.patience)
        if window is not None:
            if window.outstanding >= window.size:
                call.fail(
                    DeadlineExceeded(
                        f"not sent: {window.outstanding} calls like it wait for {self.endpoint}, which takes no more "
                        f"of them in time, as it said of another one: {window.message}",
                        retry_after_s=window.retry_after_s,
                    )
                )
                return False
            window.outstanding += 1
            call.window = window
        return True

    def _had_no_time(self, call: Call[Any], message: str, retry_after_s: float | None, now: float) -> None:
        """The daemon had no time for a call: others like it had better not be sent."""
        kind = call.kind
        if kind is None:
            return
        window = self._windows.find(kind, now)
        if window is None:
            alike = [other for other in self._pending.values() if other.kind == kind]
            window = self._windows.make(kind, len(alike) + 1)
            window.outstanding -= 1  # that call is over
            for other in alike:
                other.window = window
        window.message, window.retry_after_s = message, retry_after_s
        window.refused(call.patience, now)

    def forget(self, call: Call[Any]) -> bool:
        """Drop a call: its reply, should one come, is ignored. False: it was not under way."""
        return self._pop(call.id) is not None

    def cancellation(self, call: Call[Any]) -> bytes | None:
        """The message that withdraws a call given up just now; None if the daemon has nothing to withdraw."""
        if not self._connected or not call.can_be_withdrawn:
            return None  # another connection is another peer: the daemon forgets what the last one asked
        return wire.encode(wire.Cancel(v=wire.VERSION, id=call.id))

    def receive(self, frames: Sequence[bytes], now: float) -> Call[Any] | None:
        """Take a message from the daemon, whatever it holds. Returns the call that it finished, if any."""
        self._heard_at, self._silent_at, self._silences = now, math.inf, 0
        try:
            reply = wire.decode_reply(frames[0], self._reply_limits)
        except TensorNextError as error:
            return self._receive_malformed(frames[0], error)
        call = self._pop(reply.id)
        if call is None:
            if reply.id == self._question:
                self._learn(reply, now)
                return None
            _log.debug("dropped a reply that nobody waits for: %.200r", reply)
            return None
        self._retry_s = FIRST_RETRY_S
        if isinstance(reply, wire.ErrorReply):
            retry_after_s = None if reply.retry_after_us is None else reply.retry_after_us / 1e6
            refusal = from_code(reply.code, reply.message, retry_after_s)
            if self._asks_again(call, refusal, now):
                return None
            if retry_after_s is not None and isinstance(refusal, DeadlineExceeded | ResourceExhausted):
                self._had_no_time(call, reply.message, retry_after_s, now)
            call.fail(refusal)
            return call
        if call.strict and now >= call.expires:
            call.fail(self.timeout_error(call))
            self._had_no_time(call, "an answer came too late", None, now)
            return call
        if call.window is not None:
            call.window.served(now)
        try:
            call.succeed(reply, frames, self._reply_limits)
        except InvalidArgument as error:
            call.fail(self._malformed(call, error))
        return call

    def _asks_again(self, call: Call[Any], error: TensorNextError, now: float) -> bool:
        """A daemon that is starting or draining says when to ask again: the call waits for that, if it has the time."""
        if not isinstance(error, Unavailable) or error.retry_after_s is None:
            return False
        again = now + max(error.retry_after_s, FIRST_RETRY_S)
        if again >= call.expires:
            return False
        call.refusal = error
        call.put_off = True
        call.due = min(call.expires, again + call.reach)  # the daemon may be gone by then
        self._expiry = min(self._expiry, call.due)
        self._pending[call.id] = call
        self._pending_bytes += call.nbytes
        if call.window is not None:
            call.window.outstanding += 1
        heappush(self._again, (again, call.id))
        return True

    def asked_again(self, now: float) -> list[Call[Any]]:
        """The calls that the daemon had put off and that are to be sent now, once more."""
        calls = []
        while self._again and self._again[0][0] <= now:
            call = self._pending.get(heappop(self._again)[1])
            if call is not None:
                call.renew(now)
                call.sent()
                calls.append(call)
        return calls

    def expire(self, now: float) -> list[Call[Any]]:
        """Fail the calls whose time is over."""
        if now < self._expiry:
            return []
        expired = [call for call in self._pending.values() if call.due <= now]
        for call in expired:
            self._pop(call.id)
            call.fail(self.timeout_error(call))
            if self._connected and call.strict:
                self._had_no_time(call, "no answer came in time", None, now)
        if self._connected and self._silent_at == math.inf:
            unheard = [call.patience for call in expired if self._heard_at <= call.expires - call.patience]
            if unheard:
                self._doubt(now, min(unheard))
        self._expiry = min((call.due for call in self._pending.values()), default=math.inf)
        return expired

    def timeout_error(self, call: Call[Any]) -> DeadlineExceeded | Unavailable | InvalidArgument:
        """The error of a call whose time is over, with the reason. May be asked in any thread."""
        if self._connected and call.refusal is not None and (call.put_off or not call.changes_daemon):
            return call.refusal
        within = f"within {'its deadline of ' if call.strict else ''}{spell(call.patience)}"
        if self._connected:
            goes_on = "; it may still be at work on it" if call.changes_daemon else ""
            return DeadlineExceeded(f"{self.endpoint} did not answer {call.verb} {within}{goes_on}")
        if call.reach < call.patience:
            within = f"within {spell(call.reach)}"
        what = "lost the connection and got none again" if call.losses else "no connection"
        kind = DeadlineExceeded if call.strict else Unavailable
        return kind(f"{self.endpoint}: {what} {within}: {self._trouble}")

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
            if call.window is not None:
                call.window.outstanding -= 1
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

    # --- doubts about the daemon -----------------------------------------------------------------------------

    def question(self) -> bytes | None:
        """The message that asks the daemon how it is; None if there is no doubt, or it has been asked."""
        if not (self._asks and self._connected):
            return None
        self._asks = False
        self._question = next(self._ids)
        return wire.encode(wire.Health(v=wire.VERSION, id=self._question))

    def silent(self, now: float) -> bool:
        """Whether nothing has come for so long that the connection is to be given up. Look for messages first."""
        return self._connected and now >= self._silent_at

    def give_up(self) -> list[Call[Any]]:
        """The silent connection is closed: the calls go out on a new one. Returns those that fail, see above."""
        self._silences += 1
        self.note_trouble("nothing came over the last connection any more, though it stood")
        _log.warning("%s: nothing comes over the connection, though it stands: a new one is made", self.endpoint)
        return self.disconnected()

    def _doubt(self, now: float, patience: float) -> None:
        """A call timed out after `patience`, and nothing at all has come meanwhile."""
        wait = min(max(patience / 2, FIRST_SILENCE_S), _SILENCE_S) * 2**self._silences
        until = now + min(wait + self._pending_bytes / _SLOW_BYTES_PER_S, LAST_SILENCE_S)
        # A change would fail with its connection: it keeps it as long as it waits itself.
        self._silent_at = max([until, *(call.expires for call in self._pending.values() if call.may_have_changed_it)])
        self._asks = True

    def _learn(self, reply: wire.Reply, now: float) -> None:
        """The daemon has answered the question: send again what it takes of the calls that wait for that."""
        limit = reply.max_message_bytes if isinstance(reply, wire.HealthReport) else 0
        for call in self._held:
            if call.id not in self._pending:
                continue
            if 0 < limit < call.nbytes:
                call.refusal = InvalidArgument(
                    f"the inputs have {call.nbytes} bytes, and {self.endpoint} takes {limit} in a message: "
                    f"it ended the connection"
                )
                call.put_off, call.due = True, now
                self._expiry = min(self._expiry, now)
            else:
                heappush(self._again, (now, call.id))
        self._held, self._question = [], None

    # --- the connection --------------------------------------------------------------------------------------

    def must_connect(self, now: float) -> bool:
        """There are calls to send, no connection stands or is being made, and it is time to try."""
        return not (self._connected or self._connecting) and bool(self._pending) and now >= self._retry_at

    def connecting(self, now: float) -> None:
        """An attempt to connect begins."""
        self._connecting = True
        self._retry_at = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)

    def note_trouble(self, trouble: str, *, begun: bool = False) -> None:
        """Note how far the attempt to connect came, or why it failed: a clause for error messages.

        Args:
            begun: no more is known of the attempt than that it has begun. Why the last one failed says more.
        """
        if not (begun and self._attempt_failed):
            self._trouble = trouble

    def connected(self, now: float) -> list[Call[Any]]:
        """The attempt succeeded. Returns what to send now, in order.

        That is all but the calls whose time is over, and those that may be what the last connection broke of.
        """
        self._connecting = self._attempt_failed = False
        self._connected = True
        calls = [call for call in self._pending.values() if call.expires > now]
        self._held = [call for call in calls if call.losses and call.nbytes >= LARGE_BYTES]
        if self._held:
            self._asks = True
            held = {call.id for call in self._held}
            calls = [call for call in calls if call.id not in held]
        for call in calls:
            call.renew(now)
            call.sent()
        return calls

    def lost(self) -> list[Call[Any]]:
        """The attempt failed or the connection broke. Returns the calls that fail now; the others wait."""
        failed = []
        self._attempt_failed = not self._connected
        if self._connected:
            for call in list(self._pending.values()):
                call.losses += 1
                if call.losses >= MAX_LOSSES:
                    self._fail_lost(call)
                    failed.append(call)
        return failed + self.disconnected()

    def disconnected(self) -> list[Call[Any]]:
        """This side has closed the connection: no call is to blame.

        Returns the changes that were under way: they fail, since they are not sent twice.
        """
        unsure = [call for call in self._pending.values() if call.may_have_changed_it] if self._connected else []
        for call in unsure:
            self._fail_lost(call)
        self._connected = self._connecting = False
        self._heard_at, self._silent_at = -math.inf, math.inf
        self._asks, self._question, self._held = False, None, []
        self._again.clear()  # everything goes out on the next connection
        return unsure

    def _fail_lost(self, call: Call[Any]) -> None:
        self._pop(call.id)
        broke = f"{self.endpoint}: the connection broke" + (f" {call.losses} times" if call.losses > 1 else "")
        outcome = "; whether it has changed anything is not known" if call.may_have_changed_it else ""
        if call.losses > 1 and call.can_be_withdrawn:
            outcome = f"; an answer with a tensor of more than {self.max_frame_bytes} bytes would break it, too"
        call.fail(Unavailable(f"{broke} while {call.verb} was under way: {self._trouble}{outcome}"))


# --- what each verb's reply holds ----------------------------------------------------------------------------


def _read_result(reply: wire.Reply, frames: Sequence[bytes], limits: Limits) -> Result:
    if not isinstance(reply, wire.Result):
        raise _unexpected(reply, wire.Result)
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
        predicted_us=reply.predicted_us,
    )


def _reader(kind: type[T]) -> Callable[[Any, Sequence[bytes], Limits], T]:
    """Takes a reply that is of this kind and has no tensors."""

    def read(reply: wire.Reply, frames: Sequence[bytes], _: Limits) -> T:
        if not isinstance(reply, kind):
            raise _unexpected(reply, kind)
        if len(frames) > 1:
            raise InvalidArgument(f"{len(frames) - 1} tensor frames came with a reply that has none")
        return reply

    return read


def _read_metadata(reply: wire.Reply, frames: Sequence[bytes], limits: Limits) -> ModelInfo:
    return _reader(wire.MetadataReport)(reply, frames, limits).model


def _read_models(reply: wire.Reply, frames: Sequence[bytes], limits: Limits) -> tuple[ModelInfo, ...]:
    return _reader(wire.ModelsReport)(reply, frames, limits).models


def _unexpected(reply: wire.Reply, expected: type[Any]) -> InvalidArgument:
    return InvalidArgument(f"expected a {expected.__name__}, got a {type(reply).__name__}")
