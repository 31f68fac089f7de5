"""Known hosts: the key that each daemon must show, and the pair of the user's that is shown to it.

    ["tcp://gpu-box:5555"]
    server_key = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"
    pair = "alice"

A client has to know the key before it connects: ZeroMQ has no way to ask, so nothing is trusted at first sight. A
person carries it over, once, and `tnxctl keys trust` writes it here. From then on nothing but that key will do for the
endpoint, spelt as it is here: neither another one nor none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import msgspec

from tnxctl.files import tomledit, tomlfile
from tnxctl.keys import editing, guards, lines, pairs, places
from tnxctl.keys.credentials import Credentials
from tnxctl.protocol.errors import AlreadyExists, InvalidArgument, NotFound

_HEAD = """\
# Daemons and their keys, as tnxctl keys trust was told. Whoever changes a key here decides whom this user believes.
"""


class KnownHost(NamedTuple):
    """Known daemon. Attributes: server_key: its public key, in Z85. pair: name of the pair that is shown to it."""

    server_key: str
    pair: str


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Table of one daemon in the file."""

    server_key: str
    pair: str


def parse(text: str, label: str) -> dict[str, KnownHost]:
    """The daemons in a text, by endpoint.

    Raises:
        InvalidArgument: the first mistake, with its line.
    """
    found = {}
    for endpoint, table in tomlfile.parse(text, label).items():
        entry = tomlfile.convert(table, _Entry, label, text=text, at=(endpoint,))
        with tomlfile.placed(label, text, (endpoint, "server_key")):
            lines.decode(entry.server_key, "server_key")
        with tomlfile.placed(label, text, (endpoint, "pair")):
            lines.check_name(entry.pair, "pair")
        found[endpoint] = KnownHost(entry.server_key, entry.pair)
    return found


def read(path: Path) -> dict[str, KnownHost]:
    """The daemons in a file; none where there is no file.

    Raises:
        InvalidArgument: it cannot be read, somebody else could change it, or it has a mistake.
    """
    return parse(guards.read_settings(path), str(path)) if os.path.lexists(path) else {}


def find(endpoint: str, key: str | os.PathLike[str] | None = None, server_key: str | None = None) -> Credentials | None:
    """Credentials of a client with the daemon at an endpoint; None if it is not known: then no keys are used.

    Args:
        key: file with a secret, or the name of a pair of the user's; None: the pair that is shown to this host.
        server_key: line of `tnxctl keys server`, or the key alone; None: the one that is known of this host.

    Raises:
        InvalidArgument: a file has a mistake, cannot be read, or is not its owner's alone; or one of the two is given,
            and the other is not known.
    """
    path = places.known_hosts()
    host = read(path).get(endpoint) if key is None or server_key is None else None
    if host is None and (key is None or server_key is None):
        if key is None and server_key is None:
            return None
        needed = "server_key" if server_key is None else "key"
        raise InvalidArgument(f"{needed} is missing: {endpoint} is not among the known hosts, which would tell it")
    if key is None:
        assert host is not None
        key = host.pair
    if server_key is None:
        assert host is not None
        server, origin = host.server_key, str(path)
    else:
        server, origin = _server_key(server_key), "server_key"
    pair = pairs.read(_pair_path(key))
    return Credentials(pair.name, pair.public, pair.secret, server, origin)


def trust(path: Path, endpoint: str, line: str, pair: str, *, replace: bool) -> KnownHost:
    """Write the key of a daemon into the file, which is made where there is none.

    Args:
        line: what `tnxctl keys server` printed there.
        pair: name of the pair to show to it.
        replace: take the place of another key.

    Raises:
        InvalidArgument: the line, or the file as it is, has a mistake.
        AlreadyExists: another key is known for it.
        OSError: the file cannot be written. It is as it was then.
    """
    host = KnownHost(lines.parse(line, lines.SERVER, "line").key, pair)

    def change(text: str, found: dict[str, KnownHost]) -> tuple[str, dict[str, KnownHost]]:
        before = found.get(endpoint)
        if before is not None and before.server_key != host.server_key and not replace:
            raise AlreadyExists(
                f"{path}: another key is known for {endpoint}, {before.server_key}: if the daemon was given a new one, "
                f"--replace takes its place; if not, somebody else answers there"
            )
        if before is not None:
            text = tomledit.remove_table(text, (endpoint,))
        text = tomledit.append_table(text or _HEAD, (endpoint,), host._asdict())
        return text, {**found, endpoint: host}

    editing.edit(path, guards.read_settings, parse, change, '["ENDPOINT"]')
    return host


def forget(path: Path, endpoint: str) -> None:
    """Take a daemon off the file: from then on no keys are used with it.

    Raises:
        InvalidArgument: the file has a mistake.
        NotFound: it is not known.
        OSError: the file cannot be written. It is as it was then.
    """

    def change(text: str, found: dict[str, KnownHost]) -> tuple[str, dict[str, KnownHost]]:
        if endpoint not in found:
            raise NotFound(f"{path}: {endpoint} is not known; it has {', '.join(sorted(found)) or 'none'}")
        left = {other: host for other, host in found.items() if other != endpoint}
        return tomledit.remove_table(text, (endpoint,)), left

    editing.edit(path, guards.read_settings, parse, change, '["ENDPOINT"]')


def _pair_path(key: str | os.PathLike[str]) -> Path:
    """The file of a pair: a name has no separator and no suffix."""
    text = os.fspath(key)
    plain = isinstance(key, str) and os.path.basename(text) == text and not text.endswith(places.PAIR_SUFFIX)
    return places.pair_file(text) if plain else Path(text)


def _server_key(text: str) -> str:
    if text.startswith(lines.SERVER):
        return lines.parse(text, lines.SERVER, "server_key").key
    lines.decode(text, "server_key")
    return text
