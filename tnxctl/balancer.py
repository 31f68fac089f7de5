"""Balancer: the calls of a client of several daemons, each as attempts in the session of one or another. No socket.

    Balancer.begin(call, now)                   registers it; it may be `done` at once
    Balancer.place(call, now) / due(now)        -> an attempt to start now, with the index of its session
    Balancer.started(index, attempt)            it is in the hands of its session
    Balancer.finished(index, attempt, now)      its outcome: the call's, if that is finished with it
    Balancer.expire(now)                        -> calls that have failed
    Balancer.reconnects(now)                    -> sessions that should try to connect
    Balancer.next_timer                         time of the next look

To a driver it looks like a `Session`, and `tnxctl.links` like a `Link`; where there is one daemon, neither is there.

An attempt is a call of its own, with the same id, header and inputs. It is started on open connections alone, and what
its session would do again itself (after a lost connection, after a refusal for now) ends it here: the next attempt may
be for another daemon. So `predict` and `metadata` move; all other verbs are about one daemon, and are refused.

| the attempt ended with | then |
|---|---|
| a result, or an error that another daemon would repeat | so does the call |
| a lost connection | again, on any open one, large inputs where they are known to be taken; the third time it ends |
| UNAVAILABLE | again; that daemon is passed over |
| RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED because of others | once at each other that is there, within the budget |
| NOT_FOUND, FAILED_PRECONDITION | once at each other daemon, and those that are away are waited for |

What is sent again has the budget of `tnxctl.resending`, one for all daemons. What cannot be placed waits, see
`tnxctl.waiting`: for a token, for a connection, or until the daemons that refuse are asked again.

Copies for daemons that keep a call waiting: see `tnxctl.hedging`. The first outcome that is not to be moved is the
call's, and the other attempt is withdrawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any

from tnxctl import failures
from tnxctl.call import Call
from tnxctl.endpoints import Endpoints
from tnxctl.hedging import Hedging
from tnxctl.protocol.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    TensorNextError,
    Unavailable,
)
from tnxctl.resending import Budget
from tnxctl.results import Traffic
from tnxctl.session import LARGE_BYTES, MAX_LOSSES, MAX_PENDING_BYTES, MAX_PENDING_CALLS, Session
from tnxctl.waiting import Waiting

PATIENCE_S = 0.2
"""Time at the beginning in which other connections may come to stand beside the first one, which would else get all."""

_FIRST_FEW = 16  # calls that the first daemon gets at once

_LEAST_DELAY_S = 0.001  # between two looks whether a call can have a copy

Placement = tuple[int, Call[Any]]
"""An attempt, and the index of the session that it is for."""


class _Entry:
    """A call under way.

    Attributes:
        attempts: those in the hands of sessions, one or two.
        sent: how often it was sent. began: when it was for the first time.
        tried: the sessions that it does not return to. errors: what each said last.
        refusal: the last one for want of room, or of inputs that are too large, which is not waited out.
        losses: connections that broke under it. copy: its copy for a second daemon, once there is one.
    """

    __slots__ = ("attempts", "began", "call", "copy", "errors", "losses", "refusal", "sent", "tried")

    def __init__(self, call: Call[Any]) -> None:
        self.call = call
        self.attempts: list[Placement] = []
        self.sent = 0
        self.began = 0.0
        self.tried: set[int] = set()
        self.errors: dict[int, TensorNextError] = {}
        self.refusal: TensorNextError | None = None
        self.losses = 0
        self.copy: Call[Any] | None = None


class Balancer:
    """All calls of one client to several daemons. Used from one thread at a time.

    Args:
        sessions: one per daemon.
        budget: of the resends of them all.
        hedging: when to send copies; None: never.

    Attributes:
        sessions: as given.
        encoder: makes the calls of all of them; may be used from any thread.
    """

    def __init__(self, sessions: Sequence[Session], budget: Budget, hedging: Hedging | None) -> None:
        self.sessions = sessions
        self._budget = budget
        self.encoder = self.sessions[0].encoder
        for session in self.sessions:
            session.encoder = self.encoder  # one row of ids: those of probes are not those of attempts
        self.endpoint = ",".join(session.endpoint for session in sessions)
        self._endpoints = Endpoints(len(sessions))
        self._hedging = hedging
        self._entries: dict[int, _Entry] = {}
        self._bytes = 0
        self._waiting = Waiting(self._budget)
        self._copies: list[tuple[float, int]] = []  # a heap of times and ids: those that may be worth a copy then
        self._usable: set[tuple[int, float | None]] = set()  # where calls could be placed at the last look, and limits
        self._hoped: list[bool] = []  # by session, whether it had a connection then or was about to have one
        self._refusals: dict[int, str] = {}  # by session, why its daemon does not let this client in
        self._patient_until = -math.inf  # end of that time
        self._hurry = False  # whether a daemon serves again, so that what waits is to be looked at
        self._expiry = math.inf  # no waiting call expires earlier
        self._closed = False
        self._requests = [0] * len(sessions)
        self._moved = self._copies_won = 0

    @property
    def timeout(self) -> float:
        """Seconds allowed to a call that names no timeout of its own."""
        return self.encoder.timeout

    @property
    def shares_memory(self) -> bool:
        """Whether there is memory that any of the daemons shares now."""
        return any(session.shares_memory for session in self.sessions)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._entries

    @property
    def traffic(self) -> Traffic:
        """The numbers of what was sent so far."""
        return Traffic(
            endpoints={session.endpoint: sent for session, sent in zip(self.sessions, self._requests, strict=True)},
            moved=self._moved,
            hedged=0 if self._hedging is None else self._hedging.copies,
            hedges_won=self._copies_won,
        )

    @property
    def next_timer(self) -> float:
        """Time from which on `expire`, `due`, `reconnects` or a session may have news."""
        timer = min(session.next_timer for session in self.sessions)
        if not self._entries:
            return timer
        timer = min(timer, self._expiry, self._waiting.next_at)
        if self._waiting.has_parked and -math.inf < self._patient_until < timer:
            timer = self._patient_until
        if self._copies and self._copies[0][0] < timer:
            timer = self._copies[0][0]
        for session in self.sessions:
            connection = session.connection
            if not (connection.is_open or connection.is_connecting) and connection.retry_at < timer:
                timer = connection.retry_at
        return timer

    # --- calls that begin ------------------------------------------------------------------------------------

    def begin(self, call: Call[Any], now: float) -> None:
        """Take a call under way. It may be `done` at once, with the reason as its error."""
        if self._closed:
            call.fail(failures.already_closed(self.endpoint))
            return
        if not call.may_move:
            call.fail(failures.about_one_daemon(call, [session.endpoint for session in self.sessions]))
            return
        full = len(self._entries) >= MAX_PENDING_CALLS or self._bytes + call.nbytes > MAX_PENDING_BYTES
        if full and self._entries:  # as in a session
            limits = f"{MAX_PENDING_CALLS} and {MAX_PENDING_BYTES}"
            call.fail(failures.too_many_pending(self.endpoint, len(self._entries), self._bytes, limits))
            return
        if not self._entries and not any(session.connection.is_open for session in self.sessions):
            self._refusals.clear()
            self._patient_until = now + PATIENCE_S
            for session in self.sessions:  # nobody has been waiting: the new caller shall not wait for a retry
                session.connection.retry_at_once()
                session.connection.is_refused = False  # that was the last attempt
        self._entries[call.id] = _Entry(call)
        self._bytes += call.nbytes

    def place(self, call: Call[Any], now: float) -> Placement | None:
        """The attempt to start of a call that has just begun; None: it waits."""
        return self._place(self._entries[call.id], now)

    def due(self, now: float) -> Placement | None:
        """The attempt to start now, of a call that waited, or a copy. Start it, then ask for the next."""
        usable = {(index, self.sessions[index].message_limit) for index, _ in self._open_sessions()}
        hoped = [session.connection.is_open or session.connection.is_connecting for session in self.sessions]
        for index, session in enumerate(self.sessions):
            if session.connection.is_refused:
                self._refusals[index] = session.connection.trouble
            elif session.connection.is_open:
                self._refusals.pop(index, None)
        if self._waiting.has_parked and (hoped != self._hoped or len(self._refusals) == len(self.sessions)):
            self._expiry = -math.inf  # what was parked in a hope that is no more ends now
        if -math.inf < self._patient_until <= now:
            self._patient_until = -math.inf
            self._hurry = True
        if usable - self._usable or hoped != self._hoped or self._hurry:
            self._hurry = False
            self._waiting.hasten(now)
        self._usable, self._hoped = usable, hoped
        placement = None
        while placement is None and (call_id := self._waiting.take(now)) is not None:
            placement = self._place_again(call_id, now)
        while placement is None and self._copies and self._copies[0][0] <= now:
            placement = self._place_copy(heappop(self._copies)[1], now)
        return placement

    def started(self, index: int, attempt: Call[Any], now: float) -> None:
        """Note that an attempt was sent."""
        entry: _Entry = attempt.waiter
        self._requests[index] += 1
        if attempt.attempts > 1:
            self._budget.began()
        if attempt is not entry.copy and entry.sent:
            self._moved += 1
        hedging = self._hedging if entry.call.is_cancellable else None
        if hedging is not None and attempt is entry.copy:
            hedging.copies += 1
        elif hedging is not None:
            if not entry.sent:
                hedging.requests += 1
                entry.began = now
            delay_s = hedging.delay_s(entry.call.model)
            if delay_s is not None and not entry.sent:
                heappush(self._copies, (now + delay_s, entry.call.id))
        entry.sent = attempt.attempts

    def _open_sessions(self) -> list[tuple[int, int]]:
        """The sessions that have a connection without doubts about it, and the calls in the hands of each."""
        return [
            (index, session.outstanding)
            for index, session in enumerate(self.sessions)
            if session.connection.is_open and session.connection.half_open_at == math.inf
        ]

    def _place(self, entry: _Entry, now: float) -> Placement | None:
        """The next attempt of a call; without one, the call waits."""
        model = entry.call.model
        among = [each for each in self._open_sessions() if each[0] not in entry.tried]
        if entry.losses and entry.call.nbytes >= LARGE_BYTES:
            among = [each for each in among if self._takes(each[0], entry)]
        if now < self._patient_until and any(session.connection.is_connecting for session in self.sessions):
            among = [each for each in among if each[1] < _FIRST_FEW]
        index = self._endpoints.choose(model, among, now) if among else None
        if index is None:
            self._wait(entry, self._endpoints.back_at(model, [index for index, _ in among]))
            return None
        return self._attempt(entry, index, now)

    def _takes(self, index: int, entry: _Entry) -> bool:
        """Whether a daemon takes inputs of which a connection may have broken. It is asked, if that is not known."""
        session, call = self.sessions[index], entry.call
        limit = session.message_limit
        if limit is None:
            session.ask_limit()
        elif limit < call.nbytes:
            entry.tried.add(index)
            entry.refusal = entry.errors[index] = failures.inputs_too_large(call, session.endpoint, int(limit))
            self._expiry = -math.inf
        return limit is not None and limit >= call.nbytes

    def _place_again(self, call_id: int, now: float) -> Placement | None:
        entry = self._entries.get(call_id)
        if entry is None or entry.attempts:  # it has ended, or was placed meanwhile
            return None
        return self._place(entry, now)

    def _place_copy(self, call_id: int, now: float) -> Placement | None:
        """A second attempt of a call that has waited long for its first, if there is a daemon for it."""
        entry, hedging = self._entries.get(call_id), self._hedging
        if entry is None or hedging is None or entry.copy is not None:
            return None
        delay_s = hedging.delay_s(entry.call.model) or _LEAST_DELAY_S
        index = None
        if len(entry.attempts) == 1 and hedging.has_room(now - entry.began, delay_s) and self._budget.has_token:
            first = entry.attempts[0][0]
            among = [each for each in self._open_sessions() if each[0] not in entry.tried and each[0] != first]
            index = self._endpoints.choose(entry.call.model, among, now) if among else None
        if index is None:  # there may be one the next time
            heappush(self._copies, (now + max(delay_s, _LEAST_DELAY_S), call_id))
            return None
        placement = self._attempt(entry, index, now)
        entry.copy = placement[1]
        return placement

    def _attempt(self, entry: _Entry, index: int, now: float) -> Placement:
        attempt = entry.call.attempt(entry.sent, entry.losses, now)
        attempt.waiter = entry
        entry.attempts.append((index, attempt))
        return index, attempt

    def _wait(self, entry: _Entry, at: float) -> None:
        self._expiry = min(self._expiry, entry.call.expires)
        self._waiting.wait(entry.call.id, at, was_sent=bool(entry.sent))

    # --- outcomes --------------------------------------------------------------------------------------------

    def finished(self, index: int, attempt: Call[Any], now: float) -> Call[Any] | None:
        """Take the outcome of an attempt. Returns the call that is finished with it, if it is.

        `withdrawn` tells then which attempts nobody waits for any more.
        """
        entry: _Entry = attempt.waiter
        entry.attempts.remove((index, attempt))
        call = entry.call
        error = attempt.error
        if error is None:
            if self._endpoints.served(index, call.model, attempt.predicted_s, now):
                self._hurry = True
            if self._hedging is not None and call.is_cancellable:
                self._hedging.took(call.model, now - entry.began)
            self._copies_won += attempt is entry.copy
        else:
            entry.errors[index] = error
            if now < call.expires and self._moves(entry, index, attempt, error, now):
                if not entry.attempts:  # else the other one decides
                    self._wait(entry, now)
                return None
        self._remove(call)
        call.adopt(attempt)
        return call

    def withdrawn(self, attempt: Call[Any]) -> list[Placement]:
        """The attempts that are left of the call that this one has finished."""
        entry: _Entry = attempt.waiter
        left, entry.attempts = entry.attempts, []
        return left

    def _moves(self, entry: _Entry, index: int, attempt: Call[Any], error: TensorNextError, now: float) -> bool:
        """Whether another attempt may do better than one that ended with this error."""
        model, retry_after_s = entry.call.model, error.retry_after_s
        if isinstance(error, Unavailable):
            if not attempt.in_flight:  # its connection is lost
                entry.losses = max(entry.losses, attempt.losses)
                return entry.losses < MAX_LOSSES
            self._endpoints.refused(index, model, retry_after_s, now, shut=True)
            if retry_after_s is None:
                entry.tried.add(index)
            elif attempt.attempts > 1:
                self._budget.refund()
        elif isinstance(error, ResourceExhausted) or (
            isinstance(error, DeadlineExceeded) and retry_after_s is not None
        ):
            if isinstance(error, ResourceExhausted):
                self._endpoints.refused(index, model, retry_after_s, now, shut=False)
            entry.tried.add(index)
            entry.refusal = error
            return bool(entry.attempts) or (self._has_others(entry) and (not entry.sent or self._budget.has_token))
        elif isinstance(error, NotFound | FailedPrecondition):
            self._endpoints.refused(index, model, retry_after_s, now, shut=False)
            entry.tried.add(index)
        else:
            return False
        return bool(entry.attempts) or len(entry.tried) < len(self.sessions)

    def _has_others(self, entry: _Entry) -> bool:
        """Whether a daemon that a call has not been to is there, or may be there in a moment."""
        return any(
            session.connection.is_open or session.connection.is_connecting
            for index, session in enumerate(self.sessions)
            if index not in entry.tried
        )

    # --- calls that end without an answer --------------------------------------------------------------------

    def attempts_of(self, call: Call[Any]) -> list[Placement]:
        """The attempts of a call in the hands of sessions."""
        entry = self._entries.get(call.id)
        return [] if entry is None else list(entry.attempts)

    def forget(self, call: Call[Any]) -> bool:
        """Drop a call and its attempts. False: it was not under way."""
        for index, attempt in self.attempts_of(call):
            self.sessions[index].forget(attempt)
        return self._remove(call)

    def expire(self, now: float) -> list[Call[Any]]:
        """Fail the calls whose time is over while they wait; sessions do that with attempts.

        So are those that were refused for their size or for want of room, as soon as no daemon is left that may take
        them, and all if no daemon lets this client in.
        """
        if now < self._expiry:
            return []
        expired, self._expiry = [], math.inf
        for entry in [entry for entry in self._entries.values() if not entry.attempts]:
            call = entry.call
            error: TensorNextError | None = None
            if call.expires <= now:
                error = self.timeout_error(call)
            elif entry.refusal is not None and not self._has_others(entry):
                error = entry.refusal
            elif len(self._refusals) == len(self.sessions):
                error = failures.none_lets_in(
                    {session.endpoint: self._refusals[index] for index, session in enumerate(self.sessions)}
                )
            if error is None:
                self._expiry = min(self._expiry, call.expires)
            else:
                self._remove(call)
                call.fail(error)
                expired.append(call)
        return expired

    def timeout_error(self, call: Call[Any]) -> TensorNextError:
        """The error of a call whose time is over, with the reasons. May be asked for in any thread."""
        entry = self._entries.get(call.id)
        errors = {} if entry is None else dict(entry.errors)
        whys = {}
        for index, session in enumerate(self.sessions):
            error = errors.get(index)
            whys[session.endpoint] = session.connection.trouble if error is None else error.message
        is_silent = all(session.connection.is_silent(call.expires) for session in self.sessions)
        return failures.none_answered(call, whys, is_silent)

    def close(self) -> list[Call[Any]]:
        """Fail everything that is under way, and every later call. Idempotent."""
        self._closed = True
        for session in self.sessions:
            session.close()
        calls = [entry.call for entry in self._entries.values()]
        for call in calls:
            self._remove(call)
            call.fail(failures.closed_before(call, self.endpoint))
        return calls

    def reconnects(self, now: float) -> list[int]:
        """The sessions that are to try to connect now: with calls under way, all without a connection, at intervals."""
        if not self._entries:
            return []
        return [index for index, session in enumerate(self.sessions) if session.connection.may_connect(now)]

    def _remove(self, call: Call[Any]) -> bool:
        entry = self._entries.pop(call.id, None)
        if entry is None:
            return False
        self._bytes -= call.nbytes
        self._waiting.drop(call.id)
        return True
