"""Events of a DEALER's monitor, in words: how far an attempt to connect came, and whether somebody refused this client.

What libzmq 4.3.5 tells a client, by what the daemon does:

    a ZAP handler answers 400, or 500                HANDSHAKE_FAILED_AUTH with that number
    one side uses keys, the other none               HANDSHAKE_FAILED_PROTOCOL, mechanism mismatch; where the
                                                     end of the connection is seen first, as the next,
                                                     and the greeting tells (`tnxctl.greeting`)
    the daemon has another key than is expected      HANDSHAKE_FAILED_NO_DETAIL: it ends the connection without a word
    no ZAP handler, where keys are used              the same
    the handler is hung, or answers 300              HANDSHAKE_FAILED_NO_DETAIL after HANDSHAKE_IVL: silence

400 is the daemon's word that this client may not come in, and 500 that it has no room for it now: docs/protocol.md,
"Who is not let in". A DEALER that was refused tries no more, so each attempt is a socket of its own.
"""

from __future__ import annotations

import os

import zmq

from tnxctl.channels.channel import MISMATCH
from tnxctl.keys.credentials import Credentials

_NO_ROOM = 500


def trouble(event: int, value: int, shown: Credentials | None, *, timed_out: bool = False) -> str | None:
    """A clause for error messages about an attempt to connect; None: the event has no news.

    Args:
        shown: credentials of this client; None: it uses no keys.
        timed_out: the handshake has taken its longest time. libzmq tells it with whatever was last in errno.
    """
    match event:
        case zmq.Event.CONNECT_DELAYED:
            return "nothing answers at that address"
        case zmq.Event.CONNECT_RETRIED:
            return "the host name does not resolve"
        case zmq.Event.CLOSED:
            return "nobody listens there, or it cannot be reached"
        case zmq.Event.CONNECTED:
            return _silent(shown)
        case zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
            if timed_out:
                return _silent(shown)
            return f"the ZeroMQ handshake failed ({os.strerror(value)}){'' if shown is None else _other_key(shown)}"
        case zmq.Event.HANDSHAKE_FAILED_AUTH:
            return _refused(value, shown)
        case zmq.Event.HANDSHAKE_FAILED_PROTOCOL:
            if value == MISMATCH:
                return _mismatch(shown)
            return "the listener there does not speak ZeroMQ as a TensorNext daemon does"
        case zmq.Event.HANDSHAKE_SUCCEEDED:
            return "it closed the connection"  # the next trouble there can be
    return None


def is_failure(event: int, value: int, shown: Credentials | None) -> bool:
    """Whether an event tells of somebody who may not let this client in: it did, or it gave no reason.

    Without keys, a handshake that fails without a reason tells of a daemon that starts or ends.
    """
    return is_refusal(event, value) or (shown is not None and event == zmq.Event.HANDSHAKE_FAILED_NO_DETAIL)


def is_refusal(event: int, value: int) -> bool:
    """Whether an event tells that this client is not let in, or not so: to try again changes nothing."""
    if event == zmq.Event.HANDSHAKE_FAILED_AUTH:
        return value != _NO_ROOM
    return event == zmq.Event.HANDSHAKE_FAILED_PROTOCOL and value == MISMATCH


def _silent(shown: Credentials | None) -> str:
    if shown is None:
        return "it accepts connections, but did not finish the ZeroMQ handshake"
    return (
        "it accepts connections, but did not finish the handshake with keys: it starts, or hangs, or nobody there "
        "decides who gets in"
    )


def _other_key(shown: Credentials) -> str:
    return (
        f": it has not the key that {shown.origin} expects there, {shown.server}, or uses none, or lets nobody in. "
        f"If the daemon was given a new key: tnxctl keys trust HOST LINE --replace"
    )


def _refused(status: int, shown: Credentials | None) -> str:
    if status == _NO_ROOM:
        return "the daemon there lets nobody more in for now"
    if shown is None:
        return "the daemon there does not let this client in"
    return (
        f"the daemon there does not let {shown.name} in: its key, {shown.public}, is not among those that "
        f"tnxctl keys allow has added there, or not any more"
    )


def _mismatch(shown: Credentials | None) -> str:
    if shown is None:
        return (
            "the daemon there asks for a key, and its own is not known by this address: tnxctl keys new NAME makes one "
            "for this user, tnxctl keys allow there lets it in, and tnxctl keys trust here takes the line that "
            "tnxctl keys server prints there"
        )
    return (
        f"the listener there uses no keys, but {shown.origin} expects one: it is not the daemon that was trusted, "
        f"or that one uses none any more, which tnxctl keys forget would accept"
    )
