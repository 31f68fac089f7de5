"""Bearer tokens: the TOML file that says what each client of the bridge may do.

    [tokens.alice]
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    role = "predict"

It has the hash of a token alone. A token is 32 random bytes, so nobody finds it by its hash. The file is taken whole or
not at all, as that of the keys.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path
from typing import NamedTuple

import msgspec

from tnxctl.files import tomledit, tomlfile
from tnxctl.keys import editing, guards, lines
from tnxctl.keys.authorized import Role
from tnxctl.protocol.errors import AlreadyExists, InvalidArgument

_TABLE = "tokens"
_HEADERS = f"[{_TABLE}.NAME]"

_HEAD = """\
# What clients of tnxctl bridge may do, by the hashes of their tokens: tnxctl keys token and untoken write this file.
# After a change: systemctl reload tensornext-http, or SIGHUP to the bridge.
"""

_PREFIX = "tnxt-"  # tools that look for secrets in files find them by it
_RANDOM_BYTES = 32
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Token(NamedTuple):
    """One token.

    Attributes:
        name: of whoever has it. sha256: its hash, in hexadecimal digits. role: what it lets do.
    """

    name: str
    sha256: str
    role: Role


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Table of one token in the file."""

    sha256: str
    role: Role


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of the file."""

    tokens: dict[str, dict[str, object]] = {}


def digest(token: str) -> str:
    """The hash of a token, as the file has it."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def parse(text: str, label: str) -> dict[str, Token]:
    """The tokens in a text, by their hashes.

    Args:
        label: what to call the file in errors.

    Raises:
        InvalidArgument: the first mistake, with its line: no TOML, an unknown key or role, what is no hash, a name that
            is none, one token with two names.
    """
    tables = tomlfile.convert(tomlfile.parse(text, label), _File, label, text=text).tokens
    found: dict[str, Token] = {}
    for name, table in tables.items():
        at = (_TABLE, name)
        with tomlfile.placed(label, text, at):
            lines.check_name(name, _TABLE)
        entry = tomlfile.convert(table, _Entry, label, text=text, at=at)
        with tomlfile.placed(label, text, (*at, "sha256")):
            if not _DIGEST.fullmatch(entry.sha256):
                raise InvalidArgument(f"{'.'.join(at)}.sha256: expected 64 digits 0 to 9 and a to f")
            if entry.sha256 in found:
                raise InvalidArgument(f"{name} has the token of {found[entry.sha256].name}: one token, one name")
        found[entry.sha256] = Token(name, entry.sha256, entry.role)
    return found


def read(path: Path) -> dict[str, Token]:
    """The tokens in a file, see `parse`.

    Raises:
        InvalidArgument: it cannot be read, somebody else than its owner could change it, or it has a mistake.
    """
    return parse(guards.read_list(path), str(path))


def add(path: Path, name: str, role: Role) -> str:
    """Make a token and add it to the file, which is made where there is none. Returns the token, which is kept nowhere.

    Raises:
        InvalidArgument: the name is none, or the file as it is has a mistake.
        FailedPrecondition: the file is written in another style of TOML, and has to be changed by hand.
        AlreadyExists: there is one of that name.
        OSError: the file cannot be written. It is as it was then.
    """
    lines.check_name(name, "name")
    token = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    new = Token(name, digest(token), role)

    def change(text: str, found: dict[str, Token]) -> tuple[str, dict[str, Token]]:
        if any(other.name == name for other in found.values()):
            raise AlreadyExists(f"{path}: {name} has a token there: tnxctl keys untoken {name} first")
        text = tomledit.append_table(text or _HEAD, (_TABLE, name), {"sha256": new.sha256, "role": role})
        return text, {**found, new.sha256: new}

    editing.edit(path, guards.read_list, parse, change, _HEADERS)
    return token


def remove(path: Path, name: str) -> Token:
    """Take a token off the file.

    Raises:
        InvalidArgument: the file has a mistake.
        FailedPrecondition: it is written in another style of TOML, and has to be changed by hand.
        NotFound: there is none of that name.
        OSError: the file cannot be written. It is as it was then.
    """
    return editing.remove(path, guards.read_list, parse, _TABLE, name, f"{name!r} has no token there")
