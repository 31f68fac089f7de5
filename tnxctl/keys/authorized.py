"""Authorized keys: the TOML file that says whom a daemon lets in, and what each may do and take.

    [keys.alice]
    key = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
    role = "predict"
    max_requests = 256      # in flight; these four may be left out
    max_mb = 64             # of their inputs, in MiB
    rate = 500              # requests per second
    share = 2               # twice the turns of others

It is taken whole or not at all: one mistake in it, and nobody is let in by the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec

from tnxctl.files import tomledit, tomlfile
from tnxctl.keys import editing, guards, lines
from tnxctl.protocol.errors import AlreadyExists, InvalidArgument
from tnxctl.protocol.wire import MIB

Role = Literal["observe", "predict", "admin"]
"""Name of a `tnxctl.protocol.roles.Role`."""

_TABLE = "keys"
_HEADERS = f"[{_TABLE}.NAME]"

_HEAD = """\
# Whom the daemon lets in: tnxctl keys allow and revoke write this file, and keep what people write into it.
# After a change by hand: tnxctl reload.
"""


class AuthorizedKey(NamedTuple):
    """One client that a daemon lets in.

    Attributes:
        name: of the client; no address and no `uid:...` looks like it. key: its public key in Z85.
        role: what it may do.
        max_requests: its requests in flight. max_bytes: their inputs. None: what the daemon grants to everybody.
        rate: requests per second; None: any number.
        share: weight of its turns among all clients; 1 is that of those who have none.
    """

    name: str
    key: str
    role: Role
    max_requests: int | None = None
    max_bytes: int | None = None
    rate: float | None = None
    share: float = 1.0


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Table of one key in the file."""

    key: str
    role: Role
    max_requests: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_mb: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None
    rate: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None
    share: Annotated[float, msgspec.Meta(ge=0.01, le=100)] = 1.0


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of the file."""

    keys: dict[str, dict[str, object]] = {}


def parse(text: str, label: str) -> dict[bytes, AuthorizedKey]:
    """The clients in a text, by the 32 bytes of their public keys.

    Args:
        label: what to call the file in errors.

    Raises:
        InvalidArgument: the first mistake, with its line: no TOML, an unknown key or role, a wrong key or limit, a
            name that is none, one key with two names.
    """
    tables = tomlfile.convert(tomlfile.parse(text, label), _File, label, text=text).keys
    found: dict[bytes, AuthorizedKey] = {}
    for name, table in tables.items():
        at = (_TABLE, name)
        with tomlfile.placed(label, text, at):
            lines.check_name(name, _TABLE)
        entry = tomlfile.convert(table, _Entry, label, text=text, at=at)
        with tomlfile.placed(label, text, (*at, "key")):
            public = lines.decode(entry.key, f"{'.'.join(at)}.key")
            if public in found:
                raise InvalidArgument(f"{name} has the key of {found[public].name}: one key, one name")
        max_bytes = None if entry.max_mb is None else int(entry.max_mb * MIB)
        found[public] = AuthorizedKey(
            name, entry.key, entry.role, entry.max_requests, max_bytes, entry.rate, entry.share
        )
    return found


def read(path: Path) -> dict[bytes, AuthorizedKey]:
    """The clients in a file, see `parse`.

    Raises:
        InvalidArgument: it cannot be read, somebody else than its owner could change it, or it has a mistake.
    """
    return parse(guards.read_list(path), str(path))


def allow(path: Path, line: str, role: Role) -> AuthorizedKey:
    """Add a client to the file, which is made where there is none. One that is there with that role stays as it is.

    Args:
        line: the public line of the client, see `tnxctl.keys.lines`.

    Raises:
        InvalidArgument: the line, or the file as it is, has a mistake.
        FailedPrecondition: the file is written in another style of TOML, and has to be changed by hand.
        AlreadyExists: the key or the name stands there already, for somebody else or with another role.
        OSError: the file cannot be written. It is as it was then.
    """
    name, key = lines.parse(line, lines.CLIENT, "line")
    public = lines.decode(key, "line")
    new = AuthorizedKey(name, key, role)

    def change(text: str, found: dict[bytes, AuthorizedKey]) -> tuple[str, dict[bytes, AuthorizedKey]]:
        for other in found.values():
            if (other.name, other.key, other.role) == (name, key, role):
                return text, found
            if (other.name, other.key) == (name, key):
                raise AlreadyExists(f"{path}: {name} is let in already, with the role {other.role}: change it there")
            if other.key == key:
                raise AlreadyExists(f"{path}: this is the key of {other.name}, who is let in already")
            if other.name == name:
                raise AlreadyExists(f"{path}: {name} has another key there: tnxctl keys revoke {name} first")
        text = tomledit.append_table(text or _HEAD, (_TABLE, name), {"key": key, "role": role})
        return text, {**found, public: new}

    editing.edit(path, guards.read_list, parse, change, _HEADERS)
    return new


def revoke(path: Path, name: str) -> AuthorizedKey:
    """Take a client off the file.

    Raises:
        InvalidArgument: the file has a mistake.
        FailedPrecondition: it is written in another style of TOML, and has to be changed by hand.
        NotFound: nobody there has that name.
        OSError: the file cannot be written. It is as it was then.
    """
    return editing.remove(path, guards.read_list, parse, _TABLE, name, f"lets no {name!r} in")
