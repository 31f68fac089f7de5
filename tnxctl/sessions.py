"""Sessions of a client, made from its arguments: that of its one daemon, or those of several, under a `Balancer`."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

from tnxctl.arguments import check_hedge
from tnxctl.balancer import Balancer
from tnxctl.endpoint import parse_endpoints
from tnxctl.hedging import Hedging
from tnxctl.keys import lookup
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import Limits
from tnxctl.resending import Budget
from tnxctl.session import Session, SharedTensors


def session_of(
    endpoint: str | Sequence[str],
    timeout: float,
    limits: Limits | None = None,
    hedge: bool | float = False,
    key: str | os.PathLike[str] | None = None,
    server_key: str | None = None,
    shared_memory: bool = False,
) -> Session | Balancer:
    """The calls of a client of one daemon, or of several.

    Args:
        endpoint, timeout, limits, hedge, key, server_key, shared_memory: as `Client` takes them.

    Raises:
        InvalidArgument: an argument that can never work, or a file with keys that cannot be used; the sentence names
            it.
    """
    limits = limits or Limits()
    addresses = parse_endpoints(endpoint)
    percentile = check_hedge(hedge, len(addresses))

    def session(address: str, budget: Budget | None) -> Session:
        credentials = lookup.find(address, key, server_key)
        return Session(address, timeout, limits, credentials, budget, _sharing(address, limits, shared_memory))

    if len(addresses) == 1:
        return session(addresses[0], None)
    budget = Budget()
    sessions = [session(address, budget) for address in addresses]
    return Balancer(sessions, budget, None if percentile is None else Hedging(percentile))


def _sharing(address: str, limits: Limits, wanted: bool) -> SharedTensors | None:
    """The sharing of memory with the daemon at an address; None unless that is wanted.

    Raises:
        InvalidArgument: this system has no such memory, or the daemon may be on another host.
    """
    if not wanted:
        return None
    if not hasattr(os, "memfd_create"):
        raise InvalidArgument(f"shared_memory: not available on {platform.system()}, only on Linux")
    if not address.startswith("ipc://"):
        raise InvalidArgument(f"shared_memory: {address} is no address of this host alone, ipc://PATH is one")
    from tnxctl.sharing import Sharing  # numpy takes long to import

    return Sharing(address, limits.header_bytes)
