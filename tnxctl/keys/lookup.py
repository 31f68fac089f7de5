"""Lookup of credentials: what a program gives, or else what the user's files say. Where there are none, it is quick."""

from __future__ import annotations

import os

from tnxctl.keys import places
from tnxctl.keys.credentials import Credentials


def find(endpoint: str, key: str | os.PathLike[str] | None = None, server_key: str | None = None) -> Credentials | None:
    """Credentials of a client with the daemon at an endpoint; None: no keys are used.

    Args:
        key, server_key: see `tnxctl.keys.known_hosts.find`.

    Raises:
        InvalidArgument: a key file has a mistake, cannot be read, or is not its owner's alone; or a part is missing.
    """
    if key is None and server_key is None and not os.path.lexists(places.known_hosts()):
        return None  # the common case, which imports no more
    from tnxctl.keys import known_hosts

    return known_hosts.find(endpoint, key, server_key)
