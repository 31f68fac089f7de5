"""Keys of the daemon, as its configuration says: its own pair, those that may connect, and where none are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tnxctl.keys import pairs
from tnxctl.protocol.errors import InvalidArgument
from tnxd.config import CREDENTIAL, Config, control_of
from tnxd.transport.addresses import is_loopback
from tnxd.transport.key_ring import KeyRing


def check_exposure(config: Config, endpoints: Iterable[str]) -> None:
    """Check that nobody on another host can connect without a key, unless that is said to be meant.

    Raises:
        InvalidArgument: they could; the sentence has the ways out.
    """
    if config.keys.authorized or config.insecure:
        return
    for endpoint in endpoints:
        if _is_exposed(endpoint):
            raise InvalidArgument(
                f"bind: {endpoint} can be reached from other hosts, and whoever does would not have to say who it is. "
                "Ask for keys: `tnxctl keys server` makes the daemon's own, `tnxctl keys new NAME` one on each client, "
                "`tnxctl keys allow` lets it in, and [keys] authorized in the configuration names the file of those. "
                "Or let everybody in: insecure = true, or --insecure"
            )


def _is_exposed(endpoint: str) -> bool:
    """Whether an endpoint can be reached from other hosts."""
    return endpoint.startswith("tcp://") and not is_loopback(endpoint.removeprefix("tcp://").rpartition(":")[0])


def load(config: Config) -> tuple[KeyRing | None, str]:
    """The keys that may connect, and the daemon's secret key in Z85; None and "" if no keys are asked for.

    Raises:
        InvalidArgument: a file is missing or has a mistake, or only one of the two is configured.
    """
    keys = config.keys
    if not keys.authorized:
        if keys.secret:
            raise InvalidArgument("keys.secret is of no use without keys.authorized, the file of keys that may connect")
        return None, ""
    return KeyRing(Path(keys.authorized)), pairs.read(_secret_path(config)).secret


def _secret_path(config: Config) -> Path:
    """File of the daemon's own pair."""
    if config.keys.secret:
        return Path(config.keys.secret)
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise InvalidArgument(
            "keys.secret: is missing: `tnxctl keys server` makes a pair, and tells where. Under systemd, "
            f"LoadCredential={CREDENTIAL}:PATH takes its place"
        )
    return Path(directory) / CREDENTIAL


def warnings(config: Config, endpoints: Iterable[str]) -> Iterator[str]:
    """Sentences about what everybody may do who reaches these endpoints."""
    if config.keys.authorized:
        return
    for endpoint in endpoints:
        if _is_exposed(endpoint):
            orders = ", and load, unload and route them" if control_of(config) == "any" else ""
            yield (
                f"{endpoint}: insecure = true, so the daemon does not authenticate clients: anybody who reaches it can "
                f"run every model{orders}, and read names, signatures and traffic from health"
            )
