"""Session: the calls of a client under way, from sending to outcome. No socket, no thread, no clock.

    Session.start(call)                     registers it; says whether it can be sent now
    Session.connected(now) -> calls to send a connection stands: everything pending goes out on it
    Session.receive(frames, now) -> Call    the call that this reply finishes
    Session.lost() / expire(now)            -> calls that have failed; all of them, if the daemon lets nobody in
    Session.disconnected()                  likewise, when this side has closed the connection
    Session.cancel_message(call)            tells the daemon that nobody waits for the answer any more
    Session.share_message()                 asks the daemon for shared memory, on a new connection
    Session.probe_message()                 asks the daemon for its health, when there is doubt about it
    Session.give_up()                       a half-open connection is closed
    Session.next_timer                      time of the next look

Times come in as arguments, in seconds of any monotonic clock. `tnxctl.encoder` makes the calls, and
`tnxctl.connection` is the state of the connection. The shells (`tnxctl.client`, `tnxctl.aio`) only wait, and hand
finished calls to their callers.

A call is sent when a connection stands and again on each new one, until it is answered, and likewise after a refusal
that says when to come back. `predict` is pure, so running it twice does no harm, and a call outlives a restart of the
daemon if its timeout allows. Each connection is a new peer to the daemon, so a repeated id never meets its first use,
and an answer to an earlier attempt has no way to come. A deadline travels as a duration, so a call with one goes out
again with what is left of it, and not at all when nothing is. `tnxctl.resending` says how many go out again at a time.

`load`, `unload`, `route` and `reload` change what the daemon serves, and are not sent again on a new connection. To ask
for the same again would be harmless in itself. But a load may be what killed the daemon, and must not kill the next
one; and what somebody else has changed since must not be undone by a message from before. So such a call fails when the
connection breaks under it, and its caller decides. A daemon that refuses it, or that stops in good order before it is
done, says so: then it is sent again. Since it may take minutes, it also fails early while nobody is there: it waits for
a connection no longer than other calls do.

Large inputs: a daemon ends a connection when a frame is longer than it takes, which would happen again on every new
one. So large inputs under which a connection broke are held until the daemon has answered a probe, which says how much
it takes.

Every call under way is pending, and is in flight, held, or waits to be sent, for the first time or again. All events
that change it are here, together, so that a reader can see that no call is lost and none is finished twice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from tnxctl import failures
from tnxctl.backoff import growing, spread
from tnxctl.call import Call
from tnxctl.connection import FIRST_RETRY_S, Connection
from tnxctl.encoder import RequestEncoder
from tnxctl.keys.credentials import Credentials
from tnxctl.protocol import wire
from tnxctl.protocol.errors import (
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    TensorNextError,
    Unavailable,
    from_code,
)
from tnxctl.protocol.wire import Limits
from tnxctl.resending import Budget, Resends
from tnxctl.throttling import Throttle

MAX_PENDING_CALLS = 65_536
MAX_PENDING_BYTES = 1024 * wire.MIB
"""Most calls and most input bytes under way from one client: beyond that a call fails at once instead of
filling the memory of a program that asks faster than the daemon answers."""

MAX_LOSSES = 3
"""Most connections that may break under a call before it is given up: it may be what breaks them."""

LARGE_BYTES = 64 * 1024
"""Least size of inputs that a connection may have broken of: no sane limit of a daemon is below it."""

LAST_DEFERRAL_S = 0.3
"""Longest interval between two attempts of a call that the daemon refuses for now, unless it names a longer one: a
model that comes back after it had made room stays for half a second at least, so that its clients find it."""

# Reports about many devices and models outgrow the header limit that protects a daemon from its clients.
_REPLY_HEADER_BYTES = 16 * wire.MIB
_REPLY_TENSORS = 65_536

_log = logging.getLogger("tnxctl")


class SharedTensors(Protocol):
    """Tensors in memory that the daemon shares, see `tnxctl.sharing.Sharing`."""

    @property
    def is_active(self) -> bool:
        """Whether there is such memory now."""

    def ask(self, id_: int) -> bytes | None:
        """The message that asks the daemon for it."""

    def outgoing(self, call: Call[Any]) -> list[Any]:
        """The frames with which a call goes out now."""

    def incoming(self, reply: wire.Reply, frames: Sequence[Any]) -> Sequence[Any] | None:
        """The frames of a reply that came; None if it was for no call. Raises InvalidArgument."""

    def lost(self) -> None:
        """Forget the memory: the connection is no more."""


class Session:
    """All calls of one client to one endpoint. Used from one thread at a time.

    Args:
        credentials: what to show to the daemon, and to expect of it; None: no keys are used.
        budget: that of all resends of the client, if it has more than this session.
        sharing: memory that is shared with the daemon; None: none is.

    Attributes:
        credentials, sharing: as given.
        encoder: makes the calls; may be used from any thread.
        message_limit: most bytes of inputs that the daemon takes, as it has told on this connection; infinite if it has
            told none, None if it was not asked.
        connection: the state of the connection that they go out on.
        max_frames: most frames of a reply that are looked at.
        max_frame_bytes: most bytes that one of them may have.
    """

    def __init__(
        self,
        endpoint: str,
        timeout: float,
        limits: Limits,
        credentials: Credentials | None = None,
        budget: Budget | None = None,
        sharing: SharedTensors | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.credentials = credentials
        self.sharing = sharing
        self.encoder = RequestEncoder(timeout, limits)
        self.connection = Connection(endpoint)
        # A model may have any number of outputs and axes: a header of the daemon bounds it well enough.
        self._reply_limits = msgspec.structs.replace(
            limits,
            header_bytes=max(limits.header_bytes, _REPLY_HEADER_BYTES),
            tensors=max(limits.tensors, _REPLY_TENSORS),
            rank=max(limits.rank, wire.MAX_RANK),
        )
        self.max_frames = self._reply_limits.tensors + 2  # one too many of them shows that the count is wrong
        self.max_frame_bytes = max(limits.message_bytes, self._reply_limits.header_bytes)
        self._pending: dict[int | None, Call[Any]] = {}
        self._pending_bytes = 0
        self._throttle = Throttle(endpoint)
        self._closed = False
        # No pending call expires earlier; it may lie too early, then a look at the calls sets it right.
        self._expiry = math.inf
        self._budget = budget or Budget()
        self._resends = Resends(self._budget)
        self.message_limit: float | None = None
        self._probe_id: int | None = None
        self._held: list[Call[Any]] = []  # until the daemon has answered the probe

    @property
    def timeout(self) -> float:
        """Seconds allowed to a call that names no timeout of its own."""
        return self.encoder.timeout

    @property
    def shares_memory(self) -> bool:
        """Whether there is memory that the daemon shares now."""
        return self.sharing is not None and self.sharing.is_active

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._pending

    @property
    def outstanding(self) -> int:
        """Number of calls under way."""
        return len(self._pending)

    @property
    def next_timer(self) -> float:
        """Time from which on `expire`, `take_retries`, `must_connect` or the connection may have news."""
        timer = self._expiry
        connection = self.connection
        if connection.is_open:
            if connection.half_open_at < timer:
                timer = connection.half_open_at
            if self._resends.next_at < timer:
                timer = self._resends.next_at
        elif connection.is_connecting:
            if connection.ends_at < timer:
                timer = connection.ends_at
        elif self._pending and connection.retry_at < timer:
            timer = connection.retry_at
        return timer

    # --- calls that begin ------------------------------------------------------------------------------------

    def start(self, call: Call[Any]) -> bool:
        """Take a call under way. True: send it now. It may also be `done` at once, with the reason as its error."""
        if self._closed:
            call.fail(failures.already_closed(self.endpoint))
            return False
        pending = self._pending
        full = len(pending) >= MAX_PENDING_CALLS or self._pending_bytes + call.nbytes > MAX_PENDING_BYTES
        if full and pending:  # a single call is bounded by the limits of a message
            limits = f"{MAX_PENDING_CALLS} and {MAX_PENDING_BYTES}"
            call.fail(failures.too_many_pending(self.endpoint, len(pending), self._pending_bytes, limits))
            return False
        if self._throttle and not self._throttle.admit(call):
            return False
        connection = self.connection
        if not pending:  # nobody has been waiting for a connection: the new caller shall not wait for a retry
            connection.retry_at_once()
        pending[call.id] = call
        self._pending_bytes += call.nbytes
        if connection.is_open:
            call.mark_sent()
        if call.next_timeout < self._expiry:
            self._expiry = call.next_timeout
        return connection.is_open

    # --- replies ---------------------------------------------------------------------------------------------

    def receive(self, frames: Sequence[bytes], now: float) -> Call[Any] | None:
        """Take a message from the daemon, whatever it holds. Returns the call that it finished, if any."""
        connection = self.connection
        connection.received(now)
        try:
            reply = wire.decode_reply(frames[0], self._reply_limits)
        except TensorNextError as error:
            return self._receive_malformed(frames[0], error)
        misplaced: InvalidArgument | None = None
        if self.sharing is not None:
            try:
                placed = self.sharing.incoming(reply, frames)
            except InvalidArgument as error:
                misplaced = error
            else:
                if placed is None:
                    return None
                frames = placed
        call = self._pop(reply.id)
        if call is None:
            if reply.id == self._probe_id:
                self._receive_probe_reply(reply, now)
                return None
            _log.debug("dropped a reply that nobody waits for: %.200r", reply)
            return None
        connection.retry_s = FIRST_RETRY_S
        if isinstance(reply, wire.ErrorReply):
            retry_after_s = None if reply.retry_after_us is None else reply.retry_after_us / 1e6
            refusal = from_code(reply.code, reply.message, retry_after_s)
            if self._defer(call, refusal, now):
                return None
            if retry_after_s is not None and isinstance(refusal, DeadlineExceeded | ResourceExhausted):
                self._throttle.refused(call, self._pending.values(), reply.message, retry_after_s, now)
            call.fail(refusal)
            return call
        if call.firm_deadline and now >= call.expires:
            call.fail(self.timeout_error(call))
            self._throttle.refused(call, self._pending.values(), "an answer came too late", None, now)
            return call
        if call.window is not None:
            call.window.served(now)
        if call.attempts > 1:
            self._budget.refund()
        self._budget.succeeded()
        try:
            if misplaced is not None:
                raise misplaced
            call.succeed(reply, frames, self._reply_limits)
        except InvalidArgument as error:
            call.fail(failures.malformed_reply(call, self.endpoint, error.message))
        return call

    def _receive_malformed(self, header: bytes, error: TensorNextError) -> Call[Any] | None:
        call = self._pop(wire.request_id(header, self._reply_limits))
        if call is None:
            _log.debug("dropped a message from %s: %s", self.endpoint, error)
            return None
        call.fail(failures.malformed_reply(call, self.endpoint, error.message))
        return call

    def _defer(self, call: Call[Any], error: TensorNextError, now: float) -> bool:
        """Defer a call, if it has the time: a daemon that is starting or draining says when to ask again."""
        if not isinstance(error, Unavailable) or error.retry_after_s is None or call.moves:
            return False
        after_s = max(error.retry_after_s, FIRST_RETRY_S)
        if now + after_s >= call.expires:
            return False
        retry_at = now + spread(max(after_s, growing(FIRST_RETRY_S, LAST_DEFERRAL_S, call.attempts)))
        if retry_at >= call.expires:
            retry_at = now + after_s
        if call.attempts > 1:
            self._budget.refund()
        call.refusal = error
        call.in_flight = False
        call.next_timeout = min(call.expires, retry_at + call.connect_timeout)  # the daemon may be gone by then
        self._expiry = min(self._expiry, call.next_timeout)
        self._pending[call.id] = call
        self._pending_bytes += call.nbytes
        if call.window is not None:
            call.window.outstanding += 1
        self._resends.wait(call.id, retry_at)
        return True

    def take_retries(self, now: float) -> list[Call[Any]]:
        """The calls that are to be sent now, once more."""
        calls = []
        while (call_id := self._resends.take(now)) is not None:
            call = self._pending.get(call_id)
            if call is not None and not call.in_flight:  # it waits twice if it was refused twice
                self._send_again(call, now)
                calls.append(call)
        return calls

    def _send_again(self, call: Call[Any], now: float) -> None:
        call.renew(now)
        call.mark_sent()
        self._budget.began()

    # --- calls that end without a reply ----------------------------------------------------------------------

    def forget(self, call: Call[Any]) -> bool:
        """Drop a call: its reply, should one come, is ignored. False: it was not under way."""
        return self._pop(call.id) is not None

    def cancel_message(self, call: Call[Any]) -> bytes | None:
        """The message that cancels a call dropped just now; None if the daemon has nothing to cancel."""
        if not self.connection.is_open or not call.is_cancellable:
            return None  # another connection is another peer: the daemon forgets what the last one asked
        return wire.encode(wire.Cancel(v=wire.VERSION, id=call.id))

    def expire(self, now: float) -> list[Call[Any]]:
        """Fail the calls whose time is over."""
        if now < self._expiry:
            return []
        connection = self.connection
        expired = [call for call in self._pending.values() if call.next_timeout <= now]
        for call in expired:
            self._pop(call.id)
            call.fail(self.timeout_error(call))
            if connection.is_open and call.firm_deadline:
                self._throttle.refused(call, self._pending.values(), "no answer came in time", None, now)
        if connection.is_open and connection.half_open_at == math.inf:
            unanswered = [
                call.timeout for call in expired if not connection.has_received_since(call.expires - call.timeout)
            ]
            if unanswered:
                # A change would fail with its connection: it keeps it as long as it waits itself.
                changes = [call.expires for call in self._pending.values() if call.may_have_changed_daemon]
                connection.suspect(now, min(unanswered), self._pending_bytes, max(changes, default=now))
        self._expiry = min((call.next_timeout for call in self._pending.values()), default=math.inf)
        return expired

    def timeout_error(self, call: Call[Any]) -> TensorNextError:
        """The error of a call whose time is over, with the reason. May be asked for in any thread."""
        return failures.timed_out(call, self.connection)

    def close(self) -> list[Call[Any]]:
        """Fail everything that is under way, and every later call. Idempotent."""
        self._closed = True
        calls = list(self._pending.values())
        for call in calls:
            self._pop(call.id)
            call.fail(failures.closed_before(call, self.endpoint))
        if self.sharing is not None:
            self.sharing.lost()
        return calls

    def _pop(self, call_id: int | None) -> Call[Any] | None:
        call = self._pending.pop(call_id, None)
        if call is not None:
            self._pending_bytes -= call.nbytes
            if call.window is not None:
                call.window.outstanding -= 1
            if call.attempts > 1 and call.in_flight:
                self._budget.ended()
        return call

    # --- the connection --------------------------------------------------------------------------------------

    def must_connect(self, now: float) -> bool:
        """Whether there are calls to send, no connection stands or is being made, and it is time to try."""
        return bool(self._pending) and self.connection.may_connect(now)

    def connected(self, now: float) -> list[Call[Any]]:
        """Open the connection: the attempt has succeeded. Returns the calls to send now, in order.

        That is all but the calls whose time is over, those that may be what the last connection broke of, and those
        that have to wait for others to be sent again.
        """
        self.connection.opened()
        calls = []
        for call in self._pending.values():
            if call.expires <= now:
                continue
            if call.losses and call.nbytes >= LARGE_BYTES:
                self._held.append(call)
            elif not call.attempts:
                call.renew(now)
                call.mark_sent()
                calls.append(call)
            elif self._budget.has_room:
                self._send_again(call, now)
                calls.append(call)
            else:
                self._resends.wait(call.id, now)
        self.connection.wants_probe = bool(self._held)
        return calls

    def lost(self) -> list[Call[Any]]:
        """Close the connection: the attempt failed or it broke. Returns the calls that fail now; the others wait.

        A daemon that does not let this client in will not do so for any of them: then all fail.
        """
        failed = []
        if self.connection.is_refused:
            failed = list(self._pending.values())
            for call in failed:
                self._pop(call.id)
                call.fail(failures.not_let_in(self.connection))
        elif self.connection.is_open:
            for call in [call for call in self._pending.values() if call.in_flight]:
                call.losses += 1
                if call.losses >= MAX_LOSSES:
                    self._fail_lost(call)
                    failed.append(call)
        return failed + self.disconnected()

    def disconnected(self) -> list[Call[Any]]:
        """Close the connection: this side has ended it, so no call is to blame.

        Returns the changes that were under way, which fail, since they are not sent twice, and the attempts of calls
        that may go to another daemon.
        """
        unsure = []
        if self.connection.is_open:
            unsure = [call for call in self._pending.values() if call.may_have_changed_daemon or call.moves]
        for call in unsure:
            self._fail_lost(call)
        for call in self._pending.values():
            if call.attempts > 1 and call.in_flight:
                self._budget.ended()
            call.in_flight = False
        self.connection.closed()
        if self.sharing is not None:
            self.sharing.lost()
        self._probe_id, self._held, self.message_limit = None, [], None
        self._resends.clear()  # everything goes out on the next connection
        return unsure

    def give_up(self) -> list[Call[Any]]:
        """Close the half-open connection: the calls go out on a new one. Returns those that fail, as the changes do."""
        self.connection.give_up()
        _log.warning("%s: nothing comes over the connection, though it stands: a new one is made", self.endpoint)
        return self.disconnected()

    def _fail_lost(self, call: Call[Any]) -> None:
        self._pop(call.id)
        error = failures.connection_lost(call, self.connection, self.max_frame_bytes)
        call.in_flight = False
        call.fail(error)

    def probe_message(self) -> bytes | None:
        """The message that asks the daemon for its health; None if there is no doubt, or it has been asked."""
        connection = self.connection
        if not (connection.wants_probe and connection.is_open):
            return None
        connection.wants_probe = False
        self._probe_id = next(self.encoder.ids)
        return wire.encode(wire.Health(v=wire.VERSION, id=self._probe_id))

    def share_message(self) -> bytes | None:
        """The message that asks the daemon for shared memory; None if none is wanted."""
        return None if self.sharing is None else self.sharing.ask(next(self.encoder.ids))

    def ask_limit(self) -> None:
        """Have the daemon asked for `message_limit`, unless it has been."""
        if self._probe_id is None:
            self.connection.wants_probe = True

    def _receive_probe_reply(self, reply: wire.Reply, now: float) -> None:
        """Send again the held calls that the daemon, by its answer, takes; have the others fail."""
        limit = reply.max_message_bytes if isinstance(reply, wire.HealthReport) else 0
        self.message_limit = limit or math.inf
        for call in self._held:
            if call.id not in self._pending:
                continue
            if 0 < limit < call.nbytes:
                call.refusal = failures.inputs_too_large(call, self.endpoint, limit)
                call.next_timeout = now
                self._expiry = min(self._expiry, now)
            else:
                self._resends.wait(call.id, now)
        self._held, self._probe_id = [], None
