"""Permissions: requests held against the role of their sender. The log tells who was refused, and who gave orders."""

from __future__ import annotations

import logging

from tnxctl.protocol.errors import PermissionDenied
from tnxctl.protocol.roles import LEAST_ROLES, ORDERS, Role, verb_name
from tnxctl.protocol.wire import Request
from tnxd.events import event
from tnxd.transport.access import Access
from tnxd.transport.addresses import in_words
from tnxd.transport.clients import Connection

audit = logging.getLogger("tnxd.audit")


def check(connection: Connection, request: Request, access: Access) -> None:
    """Check that a peer may ask for something. An order that it may give goes to the log.

    Raises:
        PermissionDenied: its role does not do; the log has a line about it.
    """
    least = LEAST_ROLES.get(type(request))
    if least is None or connection.role < least:
        raise refusal(connection, request, access)
    if isinstance(request, ORDERS):
        about = event("order_given", **_fields(connection, request))
        audit.info("%s: %s", _who(connection), _what(request), extra=about)


def refusal(connection: Connection, request: Request, access: Access) -> PermissionDenied:
    """Refusal of a request that the role of a peer is not enough for, which the log has from now on."""
    least = LEAST_ROLES.get(type(request))
    name, role = connection.client.name, connection.role.title
    asks = f"{verb_name(type(request))} is for {f'the role {least.title}' if least else 'nobody'}"
    why = access.limit(least or Role.ADMIN, connection.address)
    # Subject of the line is who asked for what: the log tells of each once in a while.
    extra = event("permission_denied", **_fields(connection, request))
    audit.warning("%s refused, having the role %s", f"{_who(connection)}: {_what(request)}", role, extra=extra)
    return PermissionDenied(f"{asks}, and {name} has {role}{': ' * bool(why)}{why}")


def _who(connection: Connection) -> str:
    name, address = connection.client.name, in_words(connection.address)
    return name if name == address else f"{name} at {address}"


def _fields(connection: Connection, request: Request) -> dict[str, str]:
    """Fields of an event: who asks for what."""
    return {
        "client": connection.client.name,
        "address": connection.address,
        "role": connection.role.title,
        "verb": verb_name(type(request)),
        "about": _about(request),
    }


def _about(request: Request) -> str:
    """Subject of a request: the name of a file, a model or a client."""
    return next(filter(None, (getattr(request, name, "") for name in ("file", "model", "client"))), "")


def _what(request: Request) -> str:
    """Verb of a request, and what it is about, on one line."""
    about = _about(request)
    return f"{verb_name(type(request))} {about[:100]!r}" if about else verb_name(type(request))
