"""Reports about clients: who one is, who is connected, and which keys may connect."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from tnxctl.protocol.errors import FailedPrecondition, NotFound
from tnxctl.protocol.wire import (
    MIB,
    VERSION,
    ClientInfo,
    Clients,
    ClientsReport,
    Identity,
    KeyInfo,
    Keys,
    KeysReport,
    Kick,
    KickReport,
    WhoAmI,
)
from tnxd.transport.access import Access
from tnxd.transport.addresses import in_words
from tnxd.transport.client_limits import Admission
from tnxd.transport.clients import Client, Connection
from tnxd.transport.router import Router

_MOST = 1000  # entries of a report
_MOST_ADDRESSES = 8  # of one client


def identity(request: WhoAmI, connection: Connection) -> Identity:
    """Identity of a peer, as the daemon knows it."""
    client = connection.client
    return Identity(
        v=VERSION,
        id=request.id,
        name=client.name,
        by=_told_by(client),
        role=connection.role.title,
        address=in_words(connection.address),
        connections=client.connections,
        max_requests=client.max_requests,
        max_mb=client.max_bytes / MIB,
        rate=client.rate.rate if client.rate else 0.0,
        share=client.share,
    )


def clients(request: Clients, router: Router, admission: Admission) -> ClientsReport:
    """The clients that are connected."""
    found: dict[Client, list[Connection]] = {client: [] for client in admission if client.connections > 0}
    for connection in router.connections():
        found.setdefault(connection.client, []).append(connection)
    most = sorted(found, key=lambda client: client.taken, reverse=True)[:_MOST]
    now = time.monotonic()
    return ClientsReport(
        v=VERSION,
        id=request.id,
        clients=tuple(_client_info(client, found[client], now) for client in most),
        total=len(found),
    )


def _client_info(client: Client, connections: list[Connection], now: float) -> ClientInfo:
    addresses = dict.fromkeys(in_words(connection.address) for connection in connections)
    return ClientInfo(
        name=client.name,
        by=_told_by(client),
        role=max(connection.role for connection in connections).title if connections else "",
        addresses=tuple(addresses)[:_MOST_ADDRESSES],
        connections=client.connections,
        connected_s=now - min((connection.since for connection in connections), default=now),
        requests=client.taken,
        in_flight=client.requests,
        received_bytes=client.received + sum(connection.received for connection in connections),
    )


def _told_by(client: Client) -> str:
    if client.has_key:
        return "key"
    return "user" if client.name.startswith("uid:") else "address"


def kick(request: Kick, router: Router, asking: Connection) -> KickReport:
    """End the connections of a client but the one that asks. Raises NotFound: there are none."""
    count = router.kick(request.client, asking)
    if not count:
        raise NotFound(f"no other connection is of a client {request.client!r}: tnxctl clients shows their names")
    return KickReport(v=VERSION, id=request.id, connections=count)


def keys(request: Keys, access: Access, admission: Admission, connections: Iterable[Connection]) -> KeysReport:
    """The keys that may connect. Raises FailedPrecondition: no keys are asked for."""
    if access.ring is None:
        raise FailedPrecondition("this daemon asks for no keys: [keys] authorized in its configuration names none")
    entries = list(access.ring.by_key.values())
    counts = Counter(connection.key for connection in connections)
    infos = []
    for entry in entries[:_MOST]:
        max_requests, max_bytes = admission.limits_of(entry)
        infos.append(
            KeyInfo(
                name=entry.name,
                role=entry.role.title,
                key=entry.key,
                connections=counts[entry.key],
                max_requests=max_requests,
                max_mb=max_bytes / MIB,
                rate=admission.rate_of(entry),
                share=entry.share,
            )
        )
    return KeysReport(v=VERSION, id=request.id, keys=tuple(infos), total=len(entries))
