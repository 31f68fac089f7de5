"""Browsers: requests that pages of other sites have them send, which nobody in front of them has asked for."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from functools import lru_cache

from tnxctl.bridge import addresses
from tnxctl.bridge.http import HttpError
from tnxctl.bridge.settings import Settings
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.limits import excerpt


class Pages:
    """The pages whose requests are taken: those of the bridge itself.

    A browser names the page in `Origin`. It says nothing with a GET, and a site can have its own name stand for
    127.0.0.1 (DNS rebinding): its page is then one of the bridge's, as far as the browser knows. So a bridge that
    trusts whoever reaches it on this host takes only names that no other site can have.
    """

    def __init__(self, settings: Settings) -> None:
        host, _ = settings.listen
        self._name = host
        self._trusts_this_host = settings.tokens is None and addresses.is_loopback(host)

    def check(self, headers: Mapping[bytes, str]) -> None:
        """Check where a request comes from. Raises HttpError (403)."""
        host = headers.get(b"host", "")
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise HttpError(
                403, "a page of another site asked for this: browsers send requests that nobody has asked for"
            )
        if self._trusts_this_host and host and not _is_of_this_host(host) and _name_of(host) != self._name:
            raise HttpError(
                403, f"Host {excerpt(host)} is no name of this host: ask for localhost or an address, or give --tokens"
            )


@lru_cache(64)
def _is_of_this_host(host: str) -> bool:
    """Whether no DNS of another's says what the host of a URL stands for: it is an address, or localhost."""
    name = _name_of(host)
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761, section 6.3
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name_of(host: str) -> str:
    """The name in a header Host; "" if it has none that could be."""
    try:
        return addresses.parse(host.lower(), 80)[0].rstrip(".")
    except InvalidArgument:
        return ""
