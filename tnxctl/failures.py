"""The errors that a client raises of itself, in words: time that is over, connections that broke, too many calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tnxctl.call import Call
from tnxctl.connection import Connection
from tnxctl.durations import spell
from tnxctl.protocol.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    TensorNextError,
    Unauthenticated,
    Unavailable,
)
from tnxctl.request_windows import Window


def timed_out(call: Call[Any], connection: Connection) -> TensorNextError:
    """The error of a call whose time is over, with the reason. May be asked for in any thread."""
    if connection.is_open and call.refusal is not None and not call.may_have_changed_daemon:
        return call.refusal
    kind: type[TensorNextError] = DeadlineExceeded if call.firm_deadline else Unavailable
    within = f"within {'its deadline of ' if call.firm_deadline else ''}{spell(call.timeout)}"
    if connection.is_open and call.attempts and not call.in_flight:
        return kind(
            f"{connection.endpoint}: the connection broke while {call.verb} was under way, and it was not sent again "
            f"{within}: others were before it"
        )
    if connection.is_open:
        goes_on = "; it may still be at work on it" if call.changes_daemon else ""
        return DeadlineExceeded(f"{connection.endpoint} did not answer {call.verb} {within}{goes_on}")
    if call.connect_timeout < call.timeout:
        within = f"within {spell(call.connect_timeout)}"
    state = "lost the connection and got none again" if call.attempts else "no connection"
    if not call.firm_deadline and connection.is_silent(call.next_timeout):
        kind = Unauthenticated
    return kind(f"{connection.endpoint}: {state} {within}: {connection.trouble}")


def not_let_in(connection: Connection) -> Unauthenticated:
    """The error of a call to a daemon that does not let this client in, or only by another key than it expects."""
    return Unauthenticated(f"{connection.endpoint}: {connection.trouble}")


def connection_lost(call: Call[Any], connection: Connection, max_frame_bytes: int) -> Unavailable:
    """The error of a call that fails with its connection."""
    broke = f"{connection.endpoint}: the connection broke" + (f" {call.losses} times" if call.losses > 1 else "")
    outcome = "; whether it has changed anything is not known" if call.may_have_changed_daemon else ""
    if call.losses > 1 and call.is_cancellable:
        outcome = f"; an answer with a tensor of more than {max_frame_bytes} bytes would break it, too"
    return Unavailable(f"{broke} while {call.verb} was under way: {connection.trouble}{outcome}")


def too_many_pending(endpoint: str, calls: int, nbytes: int, limits: str) -> ResourceExhausted:
    """The error of a call that is not sent, because too many calls or bytes are under way."""
    return ResourceExhausted(f"{calls} calls with {nbytes} bytes wait for {endpoint} already, the limits are {limits}")


def window_full(window: Window, endpoint: str) -> DeadlineExceeded:
    """The error of a call that is not sent, because the daemon would refuse it."""
    return DeadlineExceeded(
        f"not sent: {window.outstanding} calls like it wait for {endpoint}, which takes no more "
        f"of them in time, as it said of another one: {window.message}",
        retry_after_s=window.retry_after_s,
    )


def inputs_too_large(call: Call[Any], endpoint: str, limit: int) -> InvalidArgument:
    """The error of a call whose inputs have ended a connection: the daemon takes no more bytes than its limit."""
    return InvalidArgument(
        f"the inputs have {call.nbytes} bytes, and {endpoint} takes {limit} in a message: it ended the connection"
    )


def none_answered(call: Call[Any], whys: Mapping[str, str], is_silent: bool) -> TensorNextError:
    """The error of a call that none of several daemons has answered in time.

    Args:
        whys: endpoint -> the reason, a clause.
        is_silent: whether none of them has finished a handshake with keys.
    """
    kind: type[TensorNextError] = Unauthenticated if is_silent else Unavailable
    if call.firm_deadline:
        kind = DeadlineExceeded
    within = f"within {'its deadline of ' if call.firm_deadline else ''}{spell(call.timeout)}"
    return kind(f"none of {len(whys)} daemons answered {call.verb} {within}: {_each(whys)}")


def none_lets_in(whys: Mapping[str, str]) -> Unauthenticated:
    """The error of a call if none of several daemons lets this client in.

    Args:
        whys: endpoint -> the reason, a clause.
    """
    return Unauthenticated(f"none of {len(whys)} daemons lets this client in: {_each(whys)}")


def _each(whys: Mapping[str, str]) -> str:
    return "; ".join(f"{endpoint}: {why.removeprefix(f'{endpoint}: ')}" for endpoint, why in whys.items())


def about_one_daemon(call: Call[Any], endpoints: Sequence[str]) -> InvalidArgument:
    """The error of a call that is about one daemon, to a client of several."""
    return InvalidArgument(
        f"{call.verb} is about one daemon, and this client is of {len(endpoints)}: make one for the daemon that you "
        f"mean, such as Client({endpoints[0]!r})"
    )


def malformed_reply(call: Call[Any], endpoint: str, why: str) -> Internal:
    """The error of a call whose reply cannot be read."""
    return Internal(f"{endpoint} answered {call.verb} with a malformed reply: {why}")


def closed_before(call: Call[Any], endpoint: str) -> Cancelled:
    """The error of a call under way when its client is closed."""
    return Cancelled(f"the client of {endpoint} was closed before {call.verb} was answered")


def already_closed(endpoint: str) -> FailedPrecondition:
    """The error of a call to a client that is closed."""
    return FailedPrecondition(f"the client of {endpoint} is closed")
