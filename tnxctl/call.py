"""A call: one request of a client, from its encoding to its outcome. No socket, no thread, no clock.

`tnxctl.encoder` makes calls, `tnxctl.session` sees them through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from tnxctl.protocol import wire
from tnxctl.protocol.errors import InvalidArgument, TensorNextError, Unavailable
from tnxctl.protocol.roles import verb_name
from tnxctl.protocol.wire import Limits
from tnxctl.request_windows import Kind, Window, kind_of

T = TypeVar("T")

ReplyReader = Callable[[Any, Sequence[bytes], Limits], T]
"""Makes the result of a call of the decoded header of its reply and all frames. Raises InvalidArgument if it cannot."""

# Requests that are sent once only, see `tnxctl.session`.
_CHANGES = (wire.Load, wire.Unload, wire.Route, wire.Reload, wire.Record, wire.StopRecording)


class Call(Generic[T]):
    """One request and, once `done`, its outcome.

    Attributes:
        frames: the header, then one buffer per tensor: the very arrays of the caller where they were contiguous.
        nbytes: bytes of all tensors together.
        timeout: seconds from the call to its failure.
        expires: time of that failure, by the clock that the session is given.
        firm_deadline: whether `expires` is a deadline: an answer that comes later is worthless.
        connect_timeout: seconds within which it must be sent; for most calls the same as `timeout`.
        next_timeout: time at which it fails unless it is sent, and once it is, unless it is answered.
        attempts: number of times that it was sent. in_flight: whether the daemon may have it now: it was sent on the
            connection that stands, and not refused.
        losses: connections that broke while it was in flight.
        moves: whether it is an attempt of another call, which may go on at another daemon: the session ends it where it
            would send any other call again.
        refusal: the daemon's reason for that, or the reason why the call is not sent again.
        window: the window that it counts in, if any.
        waiter: whatever the shell has to tell of the outcome, if anything. The session never looks at it.
    """

    __slots__ = (
        "_error",
        "_read",
        "_renewed",
        "_request",
        "_result",
        "attempts",
        "connect_timeout",
        "done",
        "expires",
        "firm_deadline",
        "frames",
        "id",
        "in_flight",
        "losses",
        "moves",
        "nbytes",
        "next_timeout",
        "refusal",
        "timeout",
        "waiter",
        "window",
    )

    def __init__(
        self,
        request: wire.Request,
        frames: list[Any],
        nbytes: int,
        read: ReplyReader[T],
        timeout: float,
        connect_timeout: float,
        firm_deadline: bool,
        now: float,
    ) -> None:
        self.id = request.id
        self.frames = frames
        self.nbytes = nbytes
        self.timeout = timeout
        self.firm_deadline = firm_deadline
        self.expires = now + timeout
        self.connect_timeout = connect_timeout
        self.next_timeout = now + connect_timeout
        self.attempts = 0
        self.in_flight = False
        self.losses = 0
        self.moves = False
        self.refusal: Unavailable | InvalidArgument | None = None
        self.done = False
        self.waiter: Any = None
        self.window: Window | None = None
        self._request = request
        self._renewed: wire.Request | None = None
        self._read = read
        self._result: T | None = None
        self._error: TensorNextError | None = None

    @property
    def request(self) -> wire.Request:
        """The request, as it was last encoded."""
        return self._renewed or self._request

    @property
    def verb(self) -> str:
        """The name of the request, for error messages."""
        return verb_name(type(self._request))

    @property
    def kind(self) -> Kind | None:
        """The kind of the request: the daemon treats requests of one kind alike."""
        return kind_of(self._request)

    @property
    def error(self) -> TensorNextError | None:
        """The error that it failed with, until `take` raises it."""
        return self._error

    @property
    def is_cancellable(self) -> bool:
        """Whether the daemon may hold it in a queue, as only `predict` requests are."""
        return isinstance(self._request, wire.Predict)

    @property
    def may_move(self) -> bool:
        """Whether any daemon may answer it, if the client has several."""
        return isinstance(self._request, wire.Predict | wire.Metadata)

    @property
    def model(self) -> str:
        """The model that it asks for, if it is about one."""
        return getattr(self._request, "model", "")

    @property
    def predicted_s(self) -> float:
        """The seconds that the daemon predicted for it when it came, as its result says; 0: nothing."""
        return getattr(self._result, "predicted_us", 0.0) / 1e6

    @property
    def changes_daemon(self) -> bool:
        """Whether it changes the state of the daemon."""
        return isinstance(self._request, _CHANGES)

    @property
    def may_have_changed_daemon(self) -> bool:
        """Whether it has been sent and may have changed the daemon, though no answer has come."""
        return self.changes_daemon and self.in_flight

    def mark_sent(self) -> None:
        """Note that the request was sent: from now on the call waits for its answer."""
        self.next_timeout = self.expires
        self.attempts += 1
        self.in_flight = True

    def renew(self, now: float) -> None:
        """Write into the header what has changed since it was encoded: the attempt, and what is left of a deadline."""
        request = self._request
        if not isinstance(request, wire.Predict):
            return
        changes: dict[str, Any] = {}
        if self.attempts:
            changes["attempt"] = self.attempts + 1
        if request.deadline_us is not None:
            changes["deadline_us"] = min((self.expires - now) * 1e6, wire.MAX_DEADLINE_US)
            changes["sent_us"] = now * 1e6
        if changes:
            self._renewed = msgspec.structs.replace(request, **changes)
            self.frames[0] = wire.encode(self._renewed)

    def attempt(self, sent: int, losses: int, now: float) -> Call[T]:
        """A copy of this call for one of several daemons.

        Args:
            sent: how often the call has been sent before.
            losses: connections that have broken under it.
        """
        attempt = Call(
            self._request, [*self.frames], self.nbytes, self._read, self.timeout, self.timeout, self.firm_deadline, now
        )
        attempt.expires = attempt.next_timeout = self.expires
        attempt.attempts, attempt.losses = sent, losses
        attempt.moves = True
        attempt.renew(now)
        return attempt

    def adopt(self, attempt: Call[T]) -> None:
        """Finish with the outcome of an attempt."""
        self._result, self._error = attempt._result, attempt._error
        self._finish()

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
        """Finish with the result that a reply holds.

        Raises:
            InvalidArgument: the reply does not answer this request. The call is not done then.
        """
        self._result = self._read(reply, frames, limits)
        self._finish()

    def fail(self, error: TensorNextError) -> None:
        """Finish with an error."""
        self._error = error
        self._finish()

    def _finish(self) -> None:
        self.done = True
        self.frames = []
